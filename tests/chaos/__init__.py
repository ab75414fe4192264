"""Faults at random moments of answers on real engines; every answer is compared with the undisturbed one."""
