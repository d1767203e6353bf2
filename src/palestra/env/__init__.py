"""What an environment is written with: `from palestra.env import Environment, Task, reward, xml`."""

from palestra.core.records import Ending, Task
from palestra.env.agent import Agent, Frozen
from palestra.env.aside import TooSlowError, aside, needs
from palestra.env.endings import AgentError
from palestra.env.environment import Environment, metric, reward
from palestra.env.images import image
from palestra.env.judge import Judge
from palestra.env.mathematics import math_equal
from palestra.env.mcp import mcp
from palestra.env.rewards import boxed, json_reply, ratio, xml
from palestra.env.rollout import Rollout
from palestra.env.sandbox import run_code
from palestra.env.tools import Tool, tool
from palestra.sandbox.box import Sandbox
from palestra.sandbox.records import Result

__all__ = [
    "Agent",
    "AgentError",
    "Ending",
    "Environment",
    "Frozen",
    "Judge",
    "Result",
    "Rollout",
    "Sandbox",
    "Task",
    "TooSlowError",
    "Tool",
    "aside",
    "boxed",
    "image",
    "json_reply",
    "math_equal",
    "mcp",
    "metric",
    "needs",
    "ratio",
    "reward",
    "run_code",
    "tool",
    "xml",
]
