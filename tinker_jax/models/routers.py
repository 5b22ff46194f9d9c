def load_metrics(counts):
    return {}
