"""What a run needs of the machine: device, ranks, signals, random numbers, files, logs. Imports no other room."""
