"""All that differs by task: classification and segmentation."""
