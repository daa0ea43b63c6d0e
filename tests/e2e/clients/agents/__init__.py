"""Coding agents: whole programs that are given a task and a folder. Each task is a process of its own."""
