"""Providers that need no more configuration than their name, as they document themselves. No I/O."""

from typing import Final

import msgspec


class Entry(msgspec.Struct, frozen=True):
    """What is known of a provider: its dialect and its base URL, "" where the operator must say."""

    dialect: str
    base_url: str


CATALOGUE: Final[dict[str, Entry]] = {
    "openai": Entry("openai", "https://api.openai.com/v1"),
    "anthropic": Entry("anthropic", "https://api.anthropic.com"),
    "gemini": Entry("gemini", "https://generativelanguage.googleapis.com"),
    "mistral": Entry("openai", "https://api.mistral.ai/v1"),
    "groq": Entry("openai", "https://api.groq.com/openai/v1"),
    "deepseek": Entry("openai", "https://api.deepseek.com/v1"),
    "xai": Entry("openai", "https://api.x.ai/v1"),
    "openrouter": Entry("openai", "https://openrouter.ai/api/v1"),
    "together": Entry("openai", "https://api.together.ai/v1"),
    "fireworks": Entry("openai", "https://api.fireworks.ai/inference/v1"),
    "cohere": Entry("openai", "https://api.cohere.com/compatibility/v1"),
    "ollama": Entry("openai", ""),
    "vllm": Entry("openai", ""),
}
