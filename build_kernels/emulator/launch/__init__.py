"""Describe a launch: grid and schedule, arguments, tensor maps, and where variables lie.

Everything that can be refused is checked here, before an instruction runs.
"""
