"""What is changed from afar: line configurations and bundles. On the device `configuration` and `rollout`, for people `client`."""
