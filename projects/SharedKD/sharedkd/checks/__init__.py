"""What is looked at before the first iteration: values, overrides, disk, and the whole run at a glance."""
