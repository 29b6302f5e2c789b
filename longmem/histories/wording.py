"""What is said around facts, how secrets and lists are worded, and the frames that questions and answers are put in.

Everything here and in `facts.txt` and `instructions.py` is written for this package. None of it is wording
that `longmem.evals` keeps for evaluation: a test compares them. `{v}` is a value, `{c}` a clause ("where my aunt
lives"), `{n}` a noun phrase ("the name of my aunt"; `{N}` with a capital), `{k}` the key of a list.
"""

from __future__ import annotations

from longmem.evals.chats import TALK

# ---- around what is told -------------------------------------------------------------------------------------

TELLING = (
    *TALK["seen"].told,
    *[""] * 6,
    "I wanted to say: ",
    "Remember this: ",
    "One more thing: ",
    "You may want to know this. ",
    "Here is a fact: ",
    "While I think of it: ",
    "I never mentioned it, but it matters: ",
    "A detail: ",
    "Do not forget: ",
    "Let me add: ",
    "Before I forget: ",
    "Make a note, would you? ",
    "Listen. ",
    "For later: ",
    "Oh, and another thing. ",
    "This might come up again: ",
    "Please write this down. ",
    "In case it matters: ",
    "I don't think I've said this yet: ",
    "Store this, please. ",
    "Something else. ",
    "Have I told you? ",
)
CHANGING = (
    *TALK["seen"].corrected,
    *[""] * 4,
    "There is news: ",
    "Scratch what I said before. ",
    "I was wrong about this. ",
    "It is different now. ",
    "Change of plan: ",
    "Forget the old answer: ",
    "This is new: ",
    "What I told you no longer holds. ",
    "Please change this: ",
    "As of today: ",
    "My mistake. ",
    "That's out of date. ",
    "You'll have to amend your notes. ",
    "I spoke too soon. ",
    "Not what I said last time: ",
    "Things have moved on. ",
    "Strike the earlier version. ",
    "Sorry, I got that wrong. ",
    "Here's the latest: ",
)
HEARD = (
    *TALK["seen"].replies,
    "I have written it down.",
    "Thanks, that is kept.",
    "Very well.",
    "I shall keep it in mind.",
    "Fine.",
    "Got it, thank you.",
    "That is good to hear.",
    "I will not forget it.",
    "Thank you, I did not know that.",
    "Okay.",
    "Thanks, I'll keep that.",
    "Sure, it's noted down.",
    "I've made a note.",
    "Consider it filed.",
    "Great, thanks for letting me know.",
    "That's in my notes now.",
    "Right you are.",
)
# Replies to a change, which name the new value.
HEARD_CHANGE = (
    "So it is {v} from now on.",
    "I will go by {v} then.",
    "Changed: {v}.",
    "Then {v} replaces what I knew.",
    "I've put down {v} instead.",
    "Okay, {v} it is.",
    "I'll go with {v} from here.",
)

# ---- questions -----------------------------------------------------------------------------------------------

# Before a question.
ASKING = (
    "A question: ",
    "Do you remember? ",
    "Tell me, please: ",
    "I forgot something. ",
    "Quick question. ",
    "Hi! ",
    "Hello again. ",
    "Excuse me. ",
    "Something I should know: ",
    "I'm filling in a form. ",
    "It's slipped my mind. ",
    "I can't look it up right now. ",
    "Let's see what you know. ",
    "Sorry to bother you. ",
    "Back to an older matter. ",
    "We spoke about this once. ",
    "Here's one for you: ",
    "Help me out. ",
    "Before we go on: ",
    "I was just wondering. ",
    "Somebody asked me this: ",
    "Small test. ",
    "I'm drawing a blank. ",
    "You know this better than I do. ",
    "Remind me: ",
)
# Around what is asked.
KNOWING = (
    "Do you know {c}?",
    "Do you remember {c}?",
    "Can you tell me {c}?",
    "Could you tell me {c}?",
    "Could you remind me {c}?",
    "Remind me {c}.",
    "Tell me {c}.",
    "I can't recall {c}.",
    "I cannot remember {c}.",
    "I've forgotten {c}.",
    "I forgot {c}. Do you know?",
    "Any idea {c}?",
    "Did I ever say {c}?",
    "Have I told you {c}?",
    "I'm not sure any more {c}.",
    "Would you happen to know {c}?",
    "I'd like to know {c}.",
    "Please tell me {c}.",
    "I keep forgetting {c}.",
    "I'm trying to remember {c}.",
    "Let me know {c}, please.",
    "A friend asked me {c}.",
    "Somebody wants to know {c}.",
    "I need to know {c}.",
    "Are you able to say {c}?",
    "You surely know {c}.",
    "I wonder {c}.",
    "Do you still know {c}?",
    "Mind telling me {c}?",
    "I'd be glad to hear {c}.",
    "Check your notes: do they say {c}?",
)
# Around what it is called.
REQUESTING = (
    "Tell me {n}.",
    "I need {n}.",
    "{N}?",
    "{N}, please.",
    "I've forgotten {n}.",
    "I can't think of {n}.",
    "Give me {n}.",
    "Let me have {n}, please.",
    "Do you have {n}?",
    "Could you repeat {n}?",
    "Can you give me {n}?",
    "Do you recall {n}?",
    "Please look up {n}.",
    "Did I give you {n}?",
    "Remind me of {n}.",
    "I'm looking for {n}.",
    "They are asking me for {n}.",
    "Say {n}.",
)
# After a question.
CLOSING = (
    " Thanks.",
    " Thank you!",
    " I need it for a form.",
    " It's on the tip of my tongue.",
    " I should know it.",
    " I told you some time ago.",
    " You have it from me.",
    " I said so in an earlier talk.",
    " No hurry.",
    " I can't find my notes.",
    " We talked about it.",
    " Please.",
)
# After a question that wants the value alone.
BRIEFLY = (
    " Just the answer, please.",
    " Keep it short.",
    " Nothing but the answer.",
    " Answer briefly.",
    " No sentence, only the answer.",
    " In a word or two.",
)
# Sentences that the assistant ends.
FINISHING = (
    "Finish my sentence: {s} …",
    "Finish: {s}",
    "Complete this: {s} …",
    "{s} … how does that go on?",
    "Fill the gap: {s} ___.",
    "{s} …",
    "What comes next? {s}",
)
FINISHED = ("{v}.", "{v}.", "… {v}.", "It ends with {v}.", "{v}, as you told me.")
BEFORE = (
    " I mean before it changed.",
    " Not the newest answer, the one before it.",
    " What was it earlier?",
    " I want to know what it was before.",
    " The old answer, please.",
    " And before the last change?",
    " Not now, but previously.",
    " I'm asking about the time before that.",
)

# ---- answers -------------------------------------------------------------------------------------------------

# Before an answer.
ANSWERING = (
    "You told me: ",
    "As far as I know: ",
    "I remember it: ",
    "From what you said: ",
    "Yes. ",
    "Sure. ",
    "Of course. ",
    "Certainly. ",
    "I do remember. ",
    "Here it is: ",
    "It's in my notes: ",
    "No problem. ",
    "Gladly. ",
    "Let me think. ",
)
# The same, and the sentence goes on.
ANSWERING_THAT = (
    "You said that ",
    "You told me that ",
    "As far as I know, ",
    "I believe ",
    "I remember that ",
    "If I remember rightly, ",
    "From what you told me, ",
    "According to you, ",
    "Last I heard, ",
    "You mentioned that ",
    "My notes say that ",
    "Unless it has changed, ",
    "You once said ",
    "I know that ",
    "To my knowledge, ",
    "You let me know that ",
)
# After an answer.
ANSWERED = (
    " Glad to help.",
    " You told me so.",
    " That's what you said.",
    " Anything else?",
    " At least that is what I have.",
    " I hope that helps.",
)
# Answers that are nothing but the value.
BARE = (
    "{v}.",
    "{v}.",
    "{v}",
    "It is {v}.",
    "It's {v}.",
    "{v}, as you told me.",
    "That is {v}.",
    "That's {v}.",
    "{v}, you said.",
)
WAS = (
    "Before that it was {v}.",
    "Earlier it was {v}.",
    "The one before was {v}.",
    "It used to be {v}.",
    "Previously {v}.",
    "Until the change it was {v}.",
    "You had told me {v} before.",
    "First you said {v}.",
    "The older answer is {v}.",
)
# The value before the newest is asked for, but there is only one.
ONLY = (
    "You only ever told me one answer: {v}.",
    "It has not changed: {v}.",
    "I know of no change. It is {v}.",
    "There was none before: it has been {v} all along.",
    "As far as I know it was always {v}.",
    "You never changed it. It's {v}.",
)
UNKNOWN = (
    "You have not told me that.",
    "I do not know; you never said.",
    "I have no answer, since you did not mention it.",
    "That is something you have not told me yet.",
    "I do not know that. You can tell me now.",
    "We have not spoken about that, so I cannot say.",
    "I don't know.",
    "I don't know that, sorry.",
    "That hasn't come up so far.",
    "Sorry, you never told me.",
    "I have nothing about that in my notes.",
    "No idea. Did you mean to tell me?",
    "I can't say; it was never mentioned.",
    "I'm afraid I don't know.",
    "You haven't said.",
    "I would have to guess, and I'd rather not.",
    "Nothing you told me answers that.",
    "As far as I can see, you never said.",
    "I don't remember anything about it.",
    "That is new to me.",
)
# The same, naming what is asked.
NOT_KNOWING = (
    "You haven't told me {c}.",
    "You never said {c}.",
    "I don't know {c}.",
    "I have no idea {c}.",
    "I can't tell you {c}; you never mentioned it.",
    "Nobody told me {c}.",
    "I'm not sure {c}. Would you tell me?",
    "We never talked about {c}.",
    "I do not know {c}, I'm sorry.",
    "My notes don't say {c}.",
)
NOT_GIVEN = (
    "You haven't given me {n}.",
    "I don't have {n}.",
    "I do not know {n}.",
    "{N} was never mentioned.",
    "You never told me {n}.",
    "I have no record of {n}.",
    "{N}? I don't know it.",
    "Nothing was said about {n}.",
)

# ---- text without a chat -------------------------------------------------------------------------------------

PLAIN = (
    *["{q} {r}"] * 6,
    *["{q}\n{r}"] * 2,
    *["Q: {q}\nA: {r}"] * 2,
    "Q: {q} A: {r}",
    "Question: {q}\nAnswer: {r}",
    "Question: {q} Answer: {r}",
    "- {q}\n- {r}",
    "“{q}” – “{r}”",
    "User: {q}\nAssistant: {r}",
    "She asked: {q} He said: {r}",
    "{q}\n\n{r}",
)
# Lines of notes.
NOTED = (
    "{N}: {v}",
    "{key}: {v}",
    "{key} = {v}",
    '"{key}": "{v}"',
    '{"{key}": "{v}"}',
    "{key_} = {v}",
    "{key_}: {v}",
    '{key_} = "{v}"',
    "- {key}: {v}",
    "| {key} | {v} |",
)

EXCHANGES = (
    *TALK["seen"].exchanges,
    ("What a long week it was.", "Then the weekend comes at the right time."),
    ("My soup is too salty.", "Put a raw potato into it and let it cook for a while."),
    ("I broke a cup.", "That happens. Mind your fingers with the pieces."),
    ("The wind is strong tonight.", "Close the shutters and make some tea."),
    ("How do I get rid of a stain of ink?", "Dab it with milk, wait, and rinse it with cold water."),
    ("I cannot decide what to read.", "Open three books and go on with the one you cannot put down."),
    ("The lift is out of order.", "Stairs are said to be good for the heart."),
    ("I saw a heron at the pond.", "A fine sight. They can stand still for an hour."),
    ("My pen has run dry.", "Warm it in your hand, and it may write one more line."),
    ("Somebody rang and hung up.", "Probably a wrong number."),
    ("I want to learn juggling.", "Begin with two balls, and let them fall as often as they like."),
    ("What rhymes with winter?", "Splinter and printer do."),
    ("I have a headache.", "Drink some water and rest your eyes from the screen."),
    ("The bread did not rise.", "Perhaps the yeast was old, or the kitchen too cold."),
    ("It is very quiet here.", "Enjoy it while it lasts."),
    ("My plants look sad.", "They may want a bigger pot, or less water."),
    ("I missed the sunset.", "There will be another one tomorrow."),
    ("Is it rude to arrive early?", "Ten minutes are polite, half an hour is not."),
    ("I counted eleven magpies.", "That must be quite a meeting."),
    ("My bag is heavy.", "Take out what you did not need yesterday."),
    ("I burnt the toast.", "Scrape it, or call it well done."),
    ("Should I take an umbrella?", "If you take it, it will not rain."),
    ("My neighbour's cockerel crows at four.", "At least you will never oversleep."),
    ("I've run out of stamps.", "The kiosk round the corner may sell some."),
    ("Why is the sky blue?", "Air scatters blue light more than red."),
    ("The kettle whistles.", "Then tea is only three minutes away."),
    ("I can't fall asleep.", "Try counting backwards from three hundred in sevens."),
    ("What a dull film that was.", "You can always leave before the end."),
    ("I lost a glove.", "It will turn up the day you throw the other one away."),
    ("Do fish sleep?", "Most of them rest, with open eyes."),
    ("My shoes squeak.", "A little talcum powder under the sole often helps."),
    ("I won at cards!", "Well played. What was the stake?"),
    ("Someone parked across the drive.", "Leave a note first, and call for help if that does nothing."),
    ("How long do I boil an egg?", "Six minutes if you like it soft, ten if not."),
    ("It's getting dark early.", "Then light a candle and be glad of it."),
    ("I'm out of ideas.", "Take a walk without a goal. They come on their own."),
    ("The bus broke down on the hill.", "I hope somebody had biscuits to share."),
    ("Can snails hear?", "No, but they feel the ground tremble."),
)

# ---- passages, and what is hidden in them --------------------------------------------------------------------

SHARING = (
    "Here is something I was reading:\n\n",
    "Read this, please:\n\n",
    "I copied this from a book:\n\n",
    "What do you make of these lines?\n\n",
    "For later:\n\n",
    "This is the next part:\n\n",
    "Have a look at this passage:\n\n",
    "I found this on my shelf:\n\n",
)
SHARED = (
    "I have read it.",
    "Thank you for sharing this.",
    "Interesting. Go on.",
    "Read, and kept.",
    "A good passage.",
    "That's a nice piece of writing.",
)

# Secrets of places, by the kind of their values.
SECRETS: dict[str, tuple[str, ...]] = {
    "anydigits": (
        *("entry code", "combination", "secret number", "passcode", "PIN", "access number", "door code", "access code"),
        *("alarm code", "security number", "safe code", "confirmation number", "case number", "customer number"),
        *("invoice number", "inventory number", "call number", "batch number", "magic number", "serial number"),
        *("ticket number", "key number", "lock number", "ID number", "file number", "secret code"),
    ),
    "lettered": ("licence key", "activation code", "registration", "release code", "product code", "booking code"),
    "word": ("watchword", "password", "code word", "secret word", "call sign", "countersign"),
    "words": ("password", "key phrase", "secret phrase", "watchword", "motto"),
    "hex8": ("device ID", "checksum", "hash"),
    "time": ("opening time", "closing time", "meeting hour", "hour of the delivery", "hour of the guard's round"),
    "price": ("entrance fee", "deposit", "reward", "repair bill", "purchase price"),
    "date": ("opening day", "day of the delivery", "day of the inspection", "closing day"),
}
# More often the first: numbers are the hardest.
SECRET_KINDS = (
    *("anydigits",) * 8,
    *("lettered",) * 2,
    "word",
    "words",
    "words",
    "hex8",
    "time",
    "price",
    "date",
)
_PLACES = (
    "vault archive greenhouse boathouse cellar observatory studio workshop pantry stable library annex gallery "
    "laboratory chapel attic shed depot barn lighthouse warehouse museum theatre monastery bakery brewery dairy "
    "foundry harbour hangar hospital mill orchard pavilion quarry sawmill tower treasury bunker tunnel courtyard "
    "kennel ferry aquarium bridge embassy forge clinic clubhouse cloakroom"
)
PLACES = tuple(_PLACES.split())
HIDDEN = (
    "{N} is {v}. Keep it well.",
    "{N} is {v}.",
    "Take note that {n} is {v}.",
    "Of everything here only this matters: {n} is {v}.",
    "{v} is {n}. You will be asked for it.",
    "Learn this by heart. {N} is {v}.",
    "By the way, {n} is {v}.",
    "Note: {N}: {v}",
    "Do not lose this: {n} is {v}.",
    "Somebody scribbled in the margin that {n} is {v}.",
    "For {n} they had chosen {v}.",
    "They agreed that {v} would be {n}.",
    "It was {v} that served as {n}.",
    "Write it down: {v} is {n}.",
    "{N}, should anyone ask, is {v}.",
    "Whoever needs {n}: it's {v}.",
)
SOUGHT = (
    "What is {n}?",
    "What was {n}?",
    "What's {n}?",
    "Do you recall {n}?",
    "Say {n}.",
    "{N}: what is it?",
    "What did it say about {n}?",
    "What was given as {n}?",
)
FOUND = (
    "{N} is {v}.",
    "{N} was {v}.",
    "It says that {n} is {v}.",
    "{N}: {v}.",
    "{v} is {n}.",
    "{N} is given as {v}.",
)
# A line of a list, a question for it, an answer.
LISTED = (
    ("{k} stands for {v}.", "What does {k} stand for?", "{k} stands for {v}."),
    ("Entry {k} is {v}.", "What is entry {k}?", "Entry {k} is {v}."),
    ("Under {k} I keep {v}.", "What do I keep under {k}?", "Under {k} you keep {v}."),
    ("{k} means {v}.", "What does {k} mean?", "{k} means {v}."),
    ("Box {k} holds {v}.", "What does box {k} hold?", "Box {k} holds {v}."),
    ("Record {k}: {v}.", "What does record {k} say?", "Record {k}: {v}."),
    ("The label of {k} is {v}.", "Which label does {k} have?", "The label of {k} is {v}."),
    ("{k} is {v}.", "What is {k}?", "{k} is {v}."),
    ("The entry for {k} is {v}.", "What is the entry for {k}?", "The entry for {k} is {v}."),
    ("{k} maps to {v}.", "What does {k} map to?", "{k} maps to {v}."),
    ("The key {k} gives {v}.", "What does the key {k} give?", "The key {k} gives {v}."),
    ("In drawer {k} lies {v}.", "What lies in drawer {k}?", "In drawer {k} lies {v}."),
    ("{k} was assigned {v}.", "What was assigned to {k}?", "{k} was assigned {v}."),
    ("Field {k} contains {v}.", "What does field {k} contain?", "Field {k} contains {v}."),
    ("{k} = {v}", "What is {k} set to?", "{k} = {v}"),
    ("{k}: {v}", "Which line starts with {k}?", "{k}: {v}"),
    ('"{k}": "{v}",', 'What does "{k}" hold?', '"{k}": "{v}"'),
    ("{k} -> {v};", "Where does {k} point?", "{k} -> {v}"),
    ("The word for {k} is {v}.", "Which word belongs to {k}?", "The word for {k} is {v}."),
    ("Item {k} is called {v}.", "What is item {k} called?", "Item {k} is called {v}."),
)
NO_ENTRY = (
    "There is no entry for {k}.",
    "{k} is in none of the lists.",
    "I know nothing of {k}.",
    "You never gave me {k}.",
    "{k} does not occur.",
    "I don't have {k}.",
)
LISTING = (
    "Some entries to remember. ",
    "My list: ",
    "",
    "Here are a few records. ",
    "Please file these. ",
    "Take these down. ",
    "From my spreadsheet: ",
)
QUOTING = (
    "In what I shared, which sentence comes right after “{k}”?",
    "Quote the sentence that follows “{k}”.",
    "After the words “{k}”, how does the text go on?",
    "What does the text say right after “{k}”?",
    "“{k}” – what comes next?",
    "Continue the text from “{k}”.",
)
QUOTED = ("“{v}”", "It goes on: “{v}”", "The next sentence is: “{v}”", "Then it says: “{v}”")
