"""Our plans beside what people use today: the same models, one run, peak against time."""
