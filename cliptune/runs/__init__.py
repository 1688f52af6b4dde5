"""What a stage does with its settings: a run's data, model, loss and verdict; an evaluation's; a check's."""
