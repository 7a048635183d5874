"""What is changed from afar: line configurations. On the device `configuration`, for people `client`."""
