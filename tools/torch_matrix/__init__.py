"""What the plugin does under several releases of torch, and what each torch makes of what the others compiled."""
