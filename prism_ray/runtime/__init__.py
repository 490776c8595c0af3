"""Where work runs: in this process, or on Ray. The only code that imports ray."""
