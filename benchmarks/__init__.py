"""How fast the plugin is, and how much memory it takes, beside neml2's C++ runtime and others."""
