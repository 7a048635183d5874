"""What is changed from afar: on the device `configuration` and `rollout`, for people `client`."""
