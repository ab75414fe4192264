"""Faults at random moments of answers on real engines; each answer is compared with the undisturbed one."""
