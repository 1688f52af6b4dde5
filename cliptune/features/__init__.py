"""From a model and a data set to features, and from features to ranks and similarities."""
