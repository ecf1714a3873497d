"""LoRA adapters: read from PEFT's folders, kept in host memory, put into one of a few places on the device."""
