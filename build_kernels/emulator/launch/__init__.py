"""Describe a launch: grid and schedule, arguments, tensor maps, addresses of variables.

Everything that can be refused is checked here, before an instruction runs.
"""
