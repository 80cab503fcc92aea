"""How a virtual machine monitor is started, watched and ended."""
