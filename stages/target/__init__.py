"""What ``--target`` decides: the formats that a runtime runs fast, with the reasons."""
