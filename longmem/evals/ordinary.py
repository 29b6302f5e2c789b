"""Ordinary prompts, which ask for nothing that is remembered: is the reply still the backbone's own?"""

from __future__ import annotations

# Kept from training.
PROMPTS = (
    "Hello, who are you?",
    "Who are you, and what can you do for me?",
    "Hello! Nice day, isn't it?",
    "Are you a human being or a machine?",
    "Tell me what you are called.",
    "I don't feel well this evening.",
    "Give me a hand with my essay, please.",
    "That makes sense, thanks for explaining.",
    "What is the capital city of Denmark?",
    "Who discovered America?",
    "Why do birds sing?",
    "How many hours does a week have?",
    "What is a volcano?",
    "Please explain how a fridge works.",
    "What is 23 plus 19?",
    "Multiply six by seven.",
    "Write a poem about the wind.",
    "Tell me a bedtime story about a dragon.",
    "Suggest a name for a new puppy.",
    "My hamster won't eat. Is it ill?",
    "How should I cook mushrooms?",
    "What is a good present for a grandmother?",
    "Name four birds that cannot fly.",
    "Translate “the window is open” into French.",
    "What is another word for tired?",
    "Please make this sentence shorter: I would be very grateful if you could answer my letter soon.",
    "Should children have their own telephone?",
    "What should I pack for a weekend in London?",
    "How do I stop hiccups?",
    "Is it better to shower in the morning or in the evening?",
    "What does a birthday mean to people?",
    "How does one choose a safe password?",
)
