"""Know what each runtime runs fast."""
