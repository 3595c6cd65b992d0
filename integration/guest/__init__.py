"""The guest for tests and demo: what goes into its initramfs, and what builds it (:mod:`integration.guest.build`)."""
