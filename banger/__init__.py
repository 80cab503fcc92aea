"""banger: disposable virtual machines whose every step is on record."""

__version__ = "0.1.0"
