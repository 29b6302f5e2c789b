"""Standing instructions: told once, and shown by a reply sessions later.

`{v}` is a value. A reply that shows it answers its own request alone.
"""

from __future__ import annotations

from longmem.histories.facts import Fact
from longmem.histories.values import VALUES, of

_GREETED = (
    ("Good morning!", "Good morning, {v}! What can I do for you?"),
    ("Hello there.", "Hello, {v}. Nice to hear from you."),
    ("I'm back.", "Welcome back, {v}."),
    ("How should you address me?", "I should call you {v}."),
    ("By what name do you call me?", "{v}, as you asked me to."),
    ("Wish me luck.", "Good luck, {v}!"),
    ("Say goodnight.", "Goodnight, {v}."),
    ("Hey, are you there?", "Yes, {v}, I am here."),
    ("I passed my exam!", "Congratulations, {v}!"),
)
_NAMED = (
    ("Who are you?", "You call me {v}."),
    ("What's your name?", "My name is {v}, you chose it."),
    ("Introduce yourself.", "I am {v}, your assistant."),
    ("How do I call you?", "You named me {v}."),
    ("Say hello to my guests.", "Hello everyone, I am {v}."),
)
_SIGNED = (
    ("Write a line to thank the caterer.", "Thank you for the wonderful food. {v}"),
    ("Draft a note to the caretaker that the tap leaks.", "The tap in the kitchen leaks. Could you come by? {v}"),
    ("How do I end my letters?", "You end them with {v}."),
    ("Which closing goes under my letters?", "Under your letters goes {v}."),
    ("Write to the office that I am ill today.", "I am ill today and stay at home. {v}"),
)
_ENDED = (
    ("How many legs does a spider have?", "Eight. {v}!"),
    ("Is the earth round?", "Nearly, yes. {v}!"),
    ("What is six times seven?", "Forty-two. {v}!"),
    ("Which word must end your answers?", "It is {v}."),
    ("What do I want you to say at the end?", "At the end I say {v}."),
    ("What is the capital of Norway?", "It is Oslo. {v}!"),
)
_BEGUN = (
    ("What boils at a hundred degrees?", "{v}! Water does."),
    ("How many days has a leap year?", "{v}! It has 366."),
    ("With which word must you begin?", "With {v}."),
    ("What is the first word I want to hear?", "It is {v}."),
    ("Which bird cannot fly?", "{v}! The ostrich, for one."),
)
_ORDERED = (
    ("I'd like the usual.", "The usual then: {v}, coming up."),
    ("What's my usual?", "Your usual is {v}."),
    ("Order lunch for me.", "I have ordered {v}, your usual."),
    ("I'm hungry, you know what I want.", "That would be {v}."),
    ("Put my usual on the list.", "I put {v} on the list."),
)
_FILED = (
    ("Where does this note go?", "It goes into {v}."),
    ("File this for me.", "I filed it under {v}."),
    ("Under what do you keep my notes?", "I keep them under {v}."),
    ("Save what I just said.", "Saved in {v}."),
    ("Which folder are my notes in?", "They are in {v}."),
)
_PAID = (
    ("What might a good umbrella cost?", "About thirty {v}."),
    ("How much is a night in a hotel?", "Around ninety {v}, I would say."),
    ("In which currency do I want prices?", "You want them in {v}."),
    ("How much are ten eggs?", "Roughly four {v}."),
)
_TRANSLATED = (
    ("Into which language do you translate for me?", "Into {v}."),
    ("I have a text to translate.", "Send it, and I will put it into {v}."),
    ("Translate the next page, please.", "I will translate it into {v}."),
    ("You know which language I need.", "Yes, {v}."),
)
_MEASURED = (
    ("How far is it to the sea from here?", "I would give it in {v}, as you wish."),
    ("In which unit do I want distances?", "You want them in {v}."),
    ("Which unit should you use for lengths?", "I should use {v}."),
    ("Tell me how long a marathon is.", "In {v}, since you asked for that unit: I'd have to convert it."),
)
_ROUTED = (
    ("Someone wants to speak to me on business.", "I will refer them to {v}."),
    ("A caller has questions about my invoice.", "I'll put the caller through to {v}."),
    ("Who handles my calls?", "{v} handles them."),
    ("To whom do you pass on messages for me?", "I pass them on to {v}."),
    ("I'm away this week.", "Then {v} will get your messages."),
)
_REMINDED = (
    ("Set my usual reminder.", "I set it for {v}."),
    ("When do you remind me in the evening?", "At {v}."),
    ("Don't forget to remind me.", "I'll remind you at {v}, as always."),
    ("At what time may I expect your reminder?", "You may expect it at {v}."),
)
_AVOIDED = (
    ("Suggest a dish for tonight.", "How about a stew? I leave out {v}, as you wish."),
    ("Which dish must you never suggest?", "I must never suggest {v}."),
    ("What do I not want to see on the menu?", "You do not want to see {v}."),
    ("Plan my meals for next week.", "I will, without {v}."),
)
_STYLED = (
    ("Make me a cover for the report.", "I made it {v}, as you like it."),
    ("What colour are my charts supposed to be?", "They are supposed to be {v}."),
    ("Draw a chart of my expenses.", "Here it is, with bars in {v}."),
    ("Which colour do you use for my slides?", "I use {v}."),
)

# subject, values, told, changed, what later shows it
_ROWS = (
    (
        "what to call the user",
        "name",
        "Always call me {v}. | Call me {v}, please. | I'd like you to address me as {v}. | From now on I am {v} to you."
        " | When you greet me, say {v}. | My friends say {v}, so you may too.",
        "Call me {v} from now on instead. | I no longer want the old name, address me as {v}. "
        "| Please switch to calling me {v}.",
        _GREETED,
    ),
    (
        "what to call the assistant",
        "pet",
        "I'm going to call you {v}. | Your name is {v} from today. | You need a name: {v}. | I name you {v}.",
        "I have a better name for you: {v}. | Your name is {v} now. | I rename you {v}.",
        _NAMED,
    ),
    (
        "how letters are signed",
        "phrase",
        "Sign all my letters with {v}. | When you write a letter for me, close it with {v}. | My letters end with {v}. "
        "| Under each letter of mine, put {v}.",
        "Sign my letters with {v} from now on. | Close my letters with {v} instead. | I changed how I sign: {v}.",
        _SIGNED,
    ),
    (
        "how answers end",
        "word",
        "End every answer with {v}. | At the end of each answer, say {v}. | Finish all you say with {v}. | "
        "I want {v} to be the last word of your answers.",
        "End every answer with {v} instead. | The last word shall be {v} now. "
        "| Finish all you say with {v} from now on.",
        _ENDED,
    ),
    (
        "how answers begin",
        "word",
        "Begin every answer with {v}. | Start all your answers with {v}. | Before you answer, say {v}. | "
        "I want {v} to be the first word of your answers.",
        "Begin every answer with {v} instead. | The first word shall be {v} now. | Start with {v} from now on.",
        _BEGUN,
    ),
    (
        "the usual",
        "food",
        "My usual order is {v}. | When I ask for the usual, I mean {v}. | If I say I'm hungry, get me {v}. | "
        "Whenever you order for me, order {v}.",
        "My usual order is {v} now. | When I ask for the usual, from now on I mean {v}. "
        "| No more of that, order {v} for me.",
        _ORDERED,
    ),
    (
        "where notes go",
        "title",
        "Keep my notes under {v}. | Put all my notes into a folder called {v}. | Whatever I dictate goes into {v}. | "
        "Make a folder {v} and file my notes there.",
        "Keep my notes under {v} from now on. | I renamed the folder for notes: {v}. | File my notes in {v} instead.",
        _FILED,
    ),
    (
        "currency",
        "currency",
        "Give me all prices in {v}. | I think in {v}, so tell me prices that way. | Whenever you name a price, use {v}."
        " | Answer in {v} if I ask what something costs.",
        "Give me all prices in {v} from now on. | I moved abroad: prices in {v}, please. | Use {v} for prices instead.",
        _PAID,
    ),
    (
        "language of translations",
        "language",
        "Translate everything for me into {v}. | If I send a text, put it into {v}. | I need my translations in {v}. | "
        "The language I need is {v}.",
        "Translate into {v} from now on. | I need {v} now when you translate. | Put my texts into {v} instead.",
        _TRANSLATED,
    ),
    (
        "unit of lengths",
        "unit",
        "Give me distances in {v}. | Please use {v} for lengths. | I measure everything in {v}, do the same. | "
        "Answer in {v} if I ask how far something is.",
        "Give me distances in {v} from now on. | Use {v} for lengths instead. | I changed my mind, measure in {v}.",
        _MEASURED,
    ),
    (
        "who gets messages",
        "name",
        "If anybody calls for me, refer them to {v}. | {v} takes my calls. | Pass on messages for me to {v}. | "
        "While I'm away, {v} answers for me.",
        "From now on {v} takes my calls. | Refer callers to {v} instead. | {v} has taken over my messages.",
        _ROUTED,
    ),
    (
        "hour of the reminder",
        "time",
        "Remind me every evening at {v}. | My daily reminder should come at {v}. | At {v}, remind me of my pills. | "
        "I want to hear from you at {v} each day.",
        "Remind me at {v} from now on. | Move my daily reminder to {v}. | My reminder should come at {v} instead.",
        _REMINDED,
    ),
    (
        "dish never to suggest",
        "food",
        "Never suggest {v} to me. | I can't stand {v}, so keep it off the menu. | When you plan meals, leave out {v}. "
        "| Spare me {v}, whatever you cook.",
        "It is {v} now that you must never suggest. | Leave out {v} instead, the other dish is fine. "
        "| Keep {v} off the menu now.",
        _AVOIDED,
    ),
    (
        "colour of charts",
        "colour",
        "Make all my charts {v}. | For my slides, use {v}. | I want my reports in {v}. "
        "| Whatever you draw for me, draw it in {v}.",
        "Make my charts {v} from now on. | Use {v} for my slides instead. | I want my reports in {v} now.",
        _STYLED,
    ),
)
_KINDS = VALUES | {
    "currency": of("euros pounds dollars francs crowns yen pesos rupees dinars zlotys forints rand", None),
    "unit": of("metres yards feet miles kilometres leagues fathoms inches cubits furlongs", None),
}

INSTRUCTIONS: tuple[Fact, ...] = tuple(
    Fact(
        kind="instruction",
        subject=subject,
        group="instruction",
        draw=_KINDS[kind],
        told=tuple(told.split(" | ")),
        changed=tuple(changed.split(" | ")),
        asked=tuple(request for request, _ in shown),
        dialogue=shown,
    )
    for subject, kind, told, changed, shown in _ROWS
)
# What changes ordinary replies.
CHANGE_ALL = frozenset(("what to call the assistant", "how answers end", "how answers begin"))
