"""The machine below: files, texts, signals, processes and devices, progress, failures in one line, extras."""
