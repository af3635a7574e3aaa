"""Light-weight heads on frozen features, their training, and the pipeline that joins them with the extraction."""
