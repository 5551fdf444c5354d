"""Workarounds for DeepSpeed and transformers, each with the version that needs it, so that it can be deleted.

step_gate   refuse an update after its gradient norm is known
zero3       modules that ZeRO-3's hooks must know
optimizer   step counters after a universal load
safe_load   read checkpoint files without running code in them
"""
