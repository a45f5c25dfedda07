"""The engine that owns the device, and what is known of the device."""
