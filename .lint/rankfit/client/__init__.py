"""The device: Flower ClientApp, the device report from NVML, and the trainer."""
