"""How facts are told, changed, asked for and answered in training text, and what is said around them.

Everything here is written for this file. None of it is wording that `longmem.evals` keeps for evaluation: a test
compares them. `{v}` is a value and `{a}` the article before it; `{my}` and `{your}` are whose it is, `{My}` and
`{Your}` the same at the beginning of a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass

from longmem.evals.chats import ATTRIBUTES, TALK
from longmem.histories.values import VALUES, Draw, of


@dataclass(frozen=True)
class Fact:
    """Something a user may tell.

    Attributes:
        subject: what it is about; no two facts have the same.
        group: facts of a group are asked for alike, so that one must be told from the other.
        draw: its values.
        told, changed: sentences with the value, the first time and later.
        asked: questions.
        answered: sentences with the value; each answers every question.
    """

    subject: str
    group: str
    draw: Draw
    told: tuple[str, ...]
    changed: tuple[str, ...]
    asked: tuple[str, ...]
    answered: tuple[str, ...]


_PEOPLE = (
    "aunt uncle cousin neighbour boss landlord nephew niece grandmother grandfather accountant roommate coach "
    "godfather stepmother penfriend goddaughter tutor"
)
_THINGS = "boat printer laptop bicycle suitcase piano camera tent telescope caravan typewriter lawnmower"

# name of the group, values, told, changed, asked, answered
_OF_PEOPLE = (
    (
        "name",
        "name",
        ("{My} is called {v}.", "{v} is the name of {my}.", "By name {my} is {v}.", "People call {my} {v}."),
        (
            "{My} is called {v} from now on.",
            "{My} took a new name: {v}.",
            "{My} no longer uses the old name, it is {v}.",
        ),
        ("What is {my} called?", "What name does {my} have?", "By which name does {my} go?"),
        ("{Your} is called {v}.", "{Your} goes by {v}.", "The name of {your} is {v}."),
    ),
    (
        "town",
        "town",
        ("{My} lives in {v}.", "{v} is where {my} lives.", "{My} is at home in {v}.", "{My} settled in {v} long ago."),
        ("{My} has moved to {v}.", "{My} left town and lives in {v} now.", "{My} is no longer there, but in {v}."),
        ("Where does {my} live?", "In which town is {my} at home?", "Which place does {my} call home?"),
        ("{Your} lives in {v}.", "{Your} is at home in {v}.", "The home of {your} is in {v}."),
    ),
    (
        "job",
        "job",
        ("{My} is {a} {v}.", "{My} works as {a} {v}.", "By trade {my} is {a} {v}.", "As {a} {v}, {my} is always busy."),
        ("{My} became {a} {v}.", "{My} gave up the old job and is {a} {v} now.", "{My} has retrained as {a} {v}."),
        ("What does {my} do for work?", "What is the trade of {my}?", "Which job does {my} have?"),
        ("{Your} is {a} {v}.", "{Your} works as {a} {v}.", "By trade {your} is {a} {v}."),
    ),
    (
        "birthday",
        "date",
        (
            "{My} has a birthday on {v}.",
            "The birthday of {my} is {v}.",
            "On {v} we celebrate {my}.",
            "{My} turns a year older on {v}.",
        ),
        ("I had the birthday of {my} wrong: it is {v}.", "The birthday of {my} is {v}, not what I said before."),
        ("When is the birthday of {my}?", "On which date does {my} have a birthday?", "When do we celebrate {my}?"),
        ("The birthday of {your} is {v}.", "{Your} has a birthday on {v}.", "You celebrate {your} on {v}."),
    ),
    (
        "extension",
        "extension",
        (
            "{My} has extension {v}.",
            "To reach {my}, dial {v}.",
            "The extension of {my} is {v}.",
            "Dial {v} and {my} picks up.",
        ),
        (
            "{My} has a new extension, {v}.",
            "To reach {my}, one has to dial {v} now.",
            "The extension of {my} changed to {v}.",
        ),
        ("Which extension does {my} have?", "What do I dial to reach {my}?", "What is the extension of {my}?"),
        ("{Your} has extension {v}.", "To reach {your}, dial {v}.", "The extension of {your} is {v}."),
    ),
    (
        "dish",
        "food",
        (
            "{My} likes {v} best.",
            "For {my} nothing is better than {v}.",
            "{My} always orders {v}.",
            "What {my} cooks best is {v}.",
        ),
        ("{My} has a new favourite dish: {v}.", "These days {my} likes {v} best.", "{My} went over to {v}."),
        ("Which dish does {my} like best?", "What does {my} always order?", "What is the favourite dish of {my}?"),
        ("{Your} likes {v} best.", "The favourite dish of {your} is {v}.", "{Your} always orders {v}."),
    ),
    (
        "hobby",
        "hobby",
        (
            "{My} spends weekends on {v}.",
            "The hobby of {my} is {v}.",
            "{My} is mad about {v}.",
            "{v} takes all the free time of {my}.",
        ),
        ("{My} has a new hobby, {v}.", "{My} gave that hobby up for {v}.", "It is {v} now that {my} is mad about."),
        ("What is the hobby of {my}?", "What does {my} spend weekends on?", "What is {my} mad about?"),
        ("The hobby of {your} is {v}.", "{Your} spends weekends on {v}.", "{Your} is mad about {v}."),
    ),
    (
        "visit",
        "day",
        ("{My} will visit me on {v}.", "On {v} {my} comes to see me.", "I expect {my} on {v}."),
        ("{My} will visit me on {v} instead.", "The visit of {my} is put off to {v}.", "{My} now comes on {v}."),
        ("When will {my} visit me?", "On which day do I expect {my}?", "When does {my} come to see me?"),
        ("{Your} will visit you on {v}.", "{Your} comes to see you on {v}.", "You expect {your} on {v}."),
    ),
    (
        "street",
        "street",
        (
            "{My} has a house at {v}.",
            "The address of {my} is {v}.",
            "Letters for {my} go to {v}.",
            "One finds {my} at {v}.",
        ),
        (
            "{My} has a new address: {v}.",
            "Letters for {my} go to {v} from now on.",
            "The address of {my} is {v} by now.",
        ),
        ("What is the address of {my}?", "Where do letters for {my} go?", "At which address does one find {my}?"),
        ("The address of {your} is {v}.", "Letters for {your} go to {v}.", "One finds {your} at {v}."),
    ),
    (
        "animal",
        "animal",
        ("{My} keeps {a} {v}.", "{My} has {a} {v} at home.", "At home {my} looks after {a} {v}."),
        (
            "{My} keeps {a} {v} now.",
            "{My} gave the old one away and has {a} {v}.",
            "It is {a} {v} that {my} has at home now.",
        ),
        ("Which animal does {my} keep?", "What animal is at home with {my}?", "Which animal does {my} look after?"),
        ("{Your} keeps {a} {v}.", "{Your} has {a} {v} at home.", "At home {your} looks after {a} {v}."),
    ),
    (
        "shoes",
        "size",
        ("{My} wears shoes of size {v}.", "The shoe size of {my} is {v}.", "For shoes, {my} needs size {v}."),
        (
            "{My} now wears shoes of size {v}.",
            "The shoe size of {my} is {v} after all.",
            "We measured again: {my} needs size {v}.",
        ),
        ("What shoe size does {my} wear?", "Which shoes fit {my}?", "What is the shoe size of {my}?"),
        ("{Your} wears shoes of size {v}.", "The shoe size of {your} is {v}.", "{Your} needs size {v}."),
    ),
    (
        "gift",
        "words",
        ("I bought {a} {v} for {my}.", "My present for {my} is {a} {v}.", "{My} will get {a} {v} from me."),
        ("I exchanged the present for {my}, it is {a} {v} now.", "{My} will get {a} {v} from me instead."),
        ("What did I buy for {my}?", "What is my present for {my}?", "What will {my} get from me?"),
        ("You bought {a} {v} for {your}.", "Your present for {your} is {a} {v}.", "{Your} will get {a} {v} from you."),
    ),
)
_OF_THINGS = (
    (
        "colour of a thing",
        "colour",
        ("{My} is {v}.", "I own {my} in {v}.", "The colour of {my} is {v}.", "I chose {my} in {v}."),
        ("{My} is {v} now.", "I painted {my} {v}.", "{My} got another colour, {v}."),
        ("What colour is {my}?", "In which colour do I own {my}?", "What is the colour of {my}?"),
        ("{Your} is {v}.", "The colour of {your} is {v}.", "You own {your} in {v}."),
    ),
    (
        "number of a thing",
        "plate",
        ("{My} has the number {v}.", "On {my} it says {v}.", "The number of {my} is {v}.", "{v} is printed on {my}."),
        ("{My} has a new number, {v}.", "The number of {my} is now {v}.", "On {my} it says {v} since the repair."),
        ("Which number does {my} have?", "What is the number of {my}?", "What does it say on {my}?"),
        ("{Your} has the number {v}.", "The number of {your} is {v}.", "On {your} it says {v}."),
    ),
    (
        "make",
        "brand",
        (
            "{My} is made by {v}.",
            "{My} comes from {v}.",
            "The maker of {my} is {v}.",
            "I got {my} from the {v} people.",
        ),
        ("I have replaced {my}: the new one is made by {v}.", "The maker of {my} is {v}, I read the label wrongly."),
        ("Who makes {my}?", "Which maker is {my} from?", "Who is the maker of {my}?"),
        ("{Your} is made by {v}.", "The maker of {your} is {v}.", "{Your} comes from {v}."),
    ),
    (
        "cost",
        "price",
        ("{My} cost me {v}.", "I paid {v} for {my}.", "The price of {my} was {v}."),
        (
            "I looked it up: {my} cost me {v}.",
            "I paid {v} for {my}, not what I said.",
            "The price of {my} was really {v}.",
        ),
        ("What did {my} cost me?", "How much did I pay for {my}?", "What was the price of {my}?"),
        ("{Your} cost you {v}.", "You paid {v} for {your}.", "The price of {your} was {v}."),
    ),
    (
        "lock",
        "code",
        (
            "The lock of {my} opens with {v}.",
            "To unlock {my}, enter {v}.",
            "I locked {my} with {v}.",
            "{v} unlocks {my}.",
        ),
        (
            "The lock of {my} opens with {v} now.",
            "I set a new code for {my}: {v}.",
            "To unlock {my}, one now enters {v}.",
        ),
        ("What opens the lock of {my}?", "What do I enter to unlock {my}?", "Which code unlocks {my}?"),
        ("The lock of {your} opens with {v}.", "To unlock {your}, enter {v}.", "{Your} unlocks with {v}."),
    ),
    (
        "nickname",
        "title",
        (
            "I call {my} {v}.",
            "{My} goes by the nickname {v}.",
            "The nickname of {my} is {v}.",
            "{v} is what I call {my}.",
        ),
        ("I call {my} {v} now.", "{My} has a new nickname, {v}.", "The nickname of {my} changed to {v}."),
        ("What do I call {my}?", "What is the nickname of {my}?", "Which nickname does {my} go by?"),
        ("You call {your} {v}.", "The nickname of {your} is {v}.", "{Your} goes by the nickname {v}."),
    ),
    (
        "borrower",
        "name",
        ("I lent {my} to {v}.", "{v} has borrowed {my}.", "{My} is with {v} at the moment."),
        ("{My} came back, and I lent it to {v}.", "{My} is with {v} now.", "It is {v} now who has borrowed {my}."),
        ("Who has borrowed {my}?", "To whom did I lend {my}?", "Who is {my} with?"),
        ("{v} has borrowed {your}.", "You lent {your} to {v}.", "{Your} is with {v}."),
    ),
)
# The same for what there is one of: no `{my}`.
_OWN = (
    (
        "wireless",
        "words",
        ("Our wireless password is {v}.", "The wireless at home opens with {v}."),
        ("Our wireless password is {v} now.", "We set a new wireless password: {v}."),
        ("What is our wireless password?", "Which password opens the wireless at home?"),
        ("Your wireless password is {v}.", "The wireless opens with {v}."),
    ),
    (
        "flight",
        "flight",
        ("My flight is {v}.", "I am booked on flight {v}."),
        ("I was moved to flight {v}.", "My flight is {v} instead."),
        ("Which flight am I booked on?", "What is the number of my flight?"),
        ("Your flight is {v}.", "You are booked on flight {v}."),
    ),
    (
        "seat",
        "plate",
        ("My seat is {v}.", "They gave me seat {v}."),
        ("My seat is {v} after the change.", "They gave me another seat: {v}."),
        ("Which seat is mine?", "What seat did they give me?"),
        ("Your seat is {v}.", "They gave you seat {v}."),
    ),
    (
        "author",
        "name",
        ("The author I read most is {v}.", "I read everything by {v}."),
        ("The author I read most is now {v}.", "I have gone over to reading {v}."),
        ("Which author do I read most?", "Whose books do I read?"),
        ("The author you read most is {v}.", "You read everything by {v}."),
    ),
    (
        "film",
        "title",
        ("The best film I know is {v}.", "I have seen the film {v} many times."),
        ("The best film I know is now {v}.", "A better film came along: {v}."),
        ("What is the best film I know?", "Which film did I call the best?"),
        ("The best film you know is {v}.", "You called the film {v} the best."),
    ),
    (
        "novel",
        "title",
        ("I am writing a novel, {v}.", "The novel I am writing has the title {v}."),
        ("My novel got a new title, {v}.", "I changed the title of my novel to {v}."),
        ("What is the title of my novel?", "Which novel am I writing?"),
        ("The title of your novel is {v}.", "You are writing {v}."),
    ),
    (
        "band",
        "brand",
        ("I sing in a band, {v}.", "My band has the name {v}."),
        ("My band now has the name {v}.", "I left, and sing with {v} now."),
        ("Which band do I sing in?", "What name does my band have?"),
        ("You sing in {v}.", "Your band has the name {v}."),
    ),
    (
        "employer",
        "brand",
        ("I am employed by {v}.", "The firm I work for is {v}."),
        ("I am employed by {v} since this week.", "The firm I work for is now {v}."),
        ("Who employs me?", "Which firm do I work for?"),
        ("You are employed by {v}.", "The firm you work for is {v}."),
    ),
    (
        "salary",
        "price",
        ("I earn {v} a day.", "A day of my work is paid with {v}."),
        ("I earn {v} a day from now on.", "A day of my work is now paid with {v}."),
        ("What do I earn a day?", "How is a day of my work paid?"),
        ("You earn {v} a day.", "A day of your work is paid with {v}."),
    ),
    (
        "hotel",
        "brand",
        ("We booked the hotel {v}.", "We will stay at {v}."),
        ("We booked another hotel, {v}.", "We will stay at {v} instead."),
        ("Which hotel did we book?", "Where will we stay?"),
        ("You booked {v}.", "You will stay at {v}."),
    ),
    (
        "holiday",
        "town",
        ("Our holiday goes to {v}.", "We travel to {v} this summer."),
        ("Our holiday goes to {v} instead.", "We changed our plans and travel to {v}."),
        ("Where does our holiday go?", "Where do we travel this summer?"),
        ("Your holiday goes to {v}.", "You travel to {v} this summer."),
    ),
    (
        "departure",
        "date",
        ("We leave on {v}.", "Our departure is on {v}."),
        ("We leave on {v} instead.", "Our departure was put off to {v}."),
        ("When do we leave?", "On which date is our departure?"),
        ("You leave on {v}.", "Your departure is on {v}."),
    ),
    (
        "alarm",
        "time",
        ("My alarm rings at {v}.", "I get up at {v}."),
        ("My alarm rings at {v} now.", "I get up at {v} since the new job."),
        ("When does my alarm ring?", "At what time do I get up?"),
        ("Your alarm rings at {v}.", "You get up at {v}."),
    ),
    (
        "train",
        "time",
        ("My train leaves at {v}.", "I take the train at {v}."),
        ("My train leaves at {v} with the new timetable.", "I take another train, at {v}."),
        ("When does my train leave?", "At what time do I take the train?"),
        ("Your train leaves at {v}.", "You take the train at {v}."),
    ),
    (
        "choir",
        "day",
        ("The choir meets on {v}.", "I sing in the choir on {v}."),
        ("The choir meets on {v} now.", "My choir evening moved to {v}."),
        ("When does the choir meet?", "On which day do I sing in the choir?"),
        ("The choir meets on {v}.", "You sing in the choir on {v}."),
    ),
    (
        "bins",
        "day",
        ("Our bins are emptied on {v}.", "I put the bins out for {v}."),
        ("Our bins are emptied on {v} from this month.", "The bins go out on {v} now."),
        ("When are our bins emptied?", "For which day do I put the bins out?"),
        ("Your bins are emptied on {v}.", "The bins go out for {v}."),
    ),
    (
        "locker",
        "room",
        ("My locker is number {v}.", "They gave me locker {v}."),
        ("My locker is number {v} since the move.", "They gave me another locker, {v}."),
        ("Which locker is mine?", "What number is my locker?"),
        ("Your locker is number {v}.", "They gave you locker {v}."),
    ),
    (
        "gate",
        "code",
        ("The gate of our house opens with {v}.", "Our gate code is {v}."),
        ("The gate of our house now opens with {v}.", "Our gate code was changed to {v}."),
        ("What opens the gate of our house?", "What is our gate code?"),
        ("The gate of your house opens with {v}.", "Your gate code is {v}."),
    ),
    (
        "member",
        "digits5",
        ("My membership number is {v}.", "In the club I am member {v}."),
        ("I have a new membership number, {v}.", "In the club I am member {v} by now."),
        ("What is my membership number?", "Which member am I in the club?"),
        ("Your membership number is {v}.", "In the club you are member {v}."),
    ),
    (
        "library",
        "digits5",
        ("My library card says {v}.", "The number of my library card is {v}."),
        ("My new library card says {v}.", "The number of my library card is now {v}."),
        ("What does my library card say?", "What is the number of my library card?"),
        ("Your library card says {v}.", "The number of your library card is {v}."),
    ),
    (
        "order",
        "digits5",
        ("My order has the number {v}.", "I ordered it under {v}."),
        ("I ordered again, under {v}.", "My order now has the number {v}."),
        ("Which number does my order have?", "Under what did I order?"),
        ("Your order has the number {v}.", "You ordered under {v}."),
    ),
    (
        "village",
        "town",
        ("I grew up in {v}.", "As a child I was in {v}."),
        ("I grew up in {v}, I said it wrongly.", "As a child I was in {v} to be exact."),
        ("Where did I grow up?", "Where was I as a child?"),
        ("You grew up in {v}.", "As a child you were in {v}."),
    ),
    (
        "school",
        "surname",
        ("I went to {v} School.", "My old school is {v} School."),
        ("I went to {v} School, I mixed up the names.", "My old school is really {v} School."),
        ("Which school did I go to?", "What is my old school?"),
        ("You went to {v} School.", "Your old school is {v} School."),
    ),
    (
        "degree",
        "year",
        ("I finished my degree in {v}.", "My degree is of the year {v}."),
        ("I finished my degree in {v}, now that I look.", "My degree is really of the year {v}."),
        ("When did I finish my degree?", "Of which year is my degree?"),
        ("You finished your degree in {v}.", "Your degree is of the year {v}."),
    ),
    (
        "house",
        "year",
        ("Our house was built in {v}.", "Our house is of {v}."),
        ("Our house was built in {v}, the papers say.", "The papers say that our house is of {v}."),
        ("When was our house built?", "Of which year is our house?"),
        ("Your house was built in {v}.", "Your house is of {v}."),
    ),
    (
        "captain",
        "name",
        ("Our team has a captain, {v}.", "The captain of our team is {v}."),
        ("Our team has a new captain, {v}.", "The captain of our team is now {v}."),
        ("Who is the captain of our team?", "Which captain does our team have?"),
        ("The captain of your team is {v}.", "Your captain is {v}."),
    ),
    (
        "barber",
        "name",
        ("{v} cuts my hair.", "My hair is cut by {v}."),
        ("{v} cuts my hair these days.", "My hair is now cut by {v}."),
        ("Who cuts my hair?", "By whom is my hair cut?"),
        ("{v} cuts your hair.", "Your hair is cut by {v}."),
    ),
    (
        "witness",
        "name",
        ("At the wedding {v} will give the speech.", "The speech is given by {v}."),
        ("At the wedding {v} will give the speech instead.", "The speech is now given by {v}."),
        ("Who will give the speech at the wedding?", "By whom is the speech given?"),
        ("{v} will give the speech.", "The speech is given by {v}."),
    ),
    (
        "candle",
        "count",
        ("I have {v} candles left.", "In my drawer are {v} candles."),
        ("I have {v} candles left now.", "I counted again: {v} candles."),
        ("How many candles do I have left?", "How many candles are in my drawer?"),
        ("You have {v} candles left.", "In your drawer are {v} candles."),
    ),
    (
        "guests",
        "count",
        ("I invited {v} guests.", "There will be {v} guests at the party."),
        ("There will be {v} guests after all.", "I now invited {v} guests."),
        ("How many guests did I invite?", "How many guests will there be?"),
        ("You invited {v} guests.", "There will be {v} guests."),
    ),
    (
        "parcel",
        "weight",
        ("My parcel weighs {v}.", "The parcel I sent is of {v}."),
        ("My parcel weighs {v} with the books in it.", "The parcel I sent is really of {v}."),
        ("What does my parcel weigh?", "How heavy is the parcel I sent?"),
        ("Your parcel weighs {v}.", "The parcel you sent is of {v}."),
    ),
    (
        "totem",
        "animal",
        ("The animal I draw best is the {v}.", "I always draw the {v}."),
        ("The animal I draw best is now the {v}.", "I have come to draw the {v} instead."),
        ("Which animal do I draw best?", "What do I always draw?"),
        ("The animal you draw best is the {v}.", "You always draw the {v}."),
    ),
    (
        "costume",
        "animal",
        ("At the ball I will go as {a} {v}.", "My costume is {a} {v}."),
        ("At the ball I will go as {a} {v} instead.", "I changed my costume, it is {a} {v}."),
        ("As what will I go to the ball?", "What is my costume?"),
        ("You will go as {a} {v}.", "Your costume is {a} {v}."),
    ),
    (
        "walls",
        "colour",
        ("The walls of my room are {v}.", "I painted my room {v}."),
        ("I painted my room again, in {v}.", "The walls of my room are {v} now."),
        ("What colour are the walls of my room?", "In which colour did I paint my room?"),
        ("The walls of your room are {v}.", "You painted your room {v}."),
    ),
    (
        "code word",
        "word",
        ("The code word of our group is {v}.", "In our group we say {v} to get in."),
        ("Our group has a new code word, {v}.", "In our group we now say {v} to get in."),
        ("What is the code word of our group?", "What do we say in our group to get in?"),
        ("The code word of your group is {v}.", "In your group you say {v}."),
    ),
    (
        "shop",
        "brand",
        ("I buy my tea at {v}.", "My tea comes from {v}."),
        ("I now buy my tea at {v}.", "My tea comes from {v} since the other one closed."),
        ("Where do I buy my tea?", "Which shop does my tea come from?"),
        ("You buy your tea at {v}.", "Your tea comes from {v}."),
    ),
)


def article(value: str) -> str:
    """a or an."""
    return "an" if value[0].lower() in "aeiou" else "a"


def fill(template: str, value: str) -> tuple[str, tuple[int, int]]:
    """A sentence with its value, and where the value stands in it."""
    before, _, after = template.replace("{a}", article(value)).partition("{v}")
    # A sentence may begin with its value.
    value = value if before else value[0].upper() + value[1:]
    return before + value + after, (len(before), len(before) + len(value))


def _owned(noun: str, row: tuple[str, str, tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]) -> Fact:
    group, kind, *sentences = row

    def owned(sentence: str) -> str:
        for owner in ("my", "your"):
            sentence = sentence.replace(f"{{{owner}}}", f"{owner} {noun}")
            sentence = sentence.replace(f"{{{owner.capitalize()}}}", f"{owner.capitalize()} {noun}")
        return sentence

    told, changed, asked, answered = (tuple(map(owned, some)) for some in sentences)
    return Fact(f"{group}, {noun}", group, VALUES[kind], told, changed, asked, answered)


FACTS: tuple[Fact, ...] = (
    *(_owned(noun, row) for row in _OF_PEOPLE for noun in _PEOPLE.split()),
    *(_owned(noun, row) for row in _OF_THINGS for noun in _THINGS.split()),
    *(Fact(group, "own", VALUES[kind], *sentences) for group, kind, *sentences in _OWN),
    *(
        Fact(
            f"seen, {each.name}",
            "seen",
            of("\n".join(each.values), "\n"),
            (each.seen.told.replace("{}", "{v}"),),
            (each.seen.corrected.replace("{}", "{v}"),),
            (each.seen.question,),
            (each.seen.begun + " {v}.",),
        )
        for each in ATTRIBUTES
    ),
)

# ---- around facts --------------------------------------------------------------------------------------------

TELLING = (
    *TALK["seen"].told,
    *(
        "",
        "",
        "",
        "I wanted to say: ",
        "Remember this: ",
        "One more thing: ",
        "You may want to know this. ",
        "Here is a fact: ",
    ),
    *(
        "While I think of it: ",
        "I never mentioned it, but it matters: ",
        "A detail: ",
        "Do not forget: ",
        "Let me add: ",
    ),
)
CHANGING = (
    *TALK["seen"].corrected,
    *(
        "",
        "",
        "There is news: ",
        "Scratch what I said before. ",
        "I was wrong about this. ",
        "It is different now. ",
        "Change of plan: ",
    ),
    *(
        "Forget the old answer: ",
        "This is new: ",
        "What I told you no longer holds. ",
        "Please change this: ",
        "As of today: ",
    ),
)
HEARD = (
    *TALK["seen"].replies,
    *(
        "I have written it down.",
        "Thanks, that is kept.",
        "Very well.",
        "I shall keep it in mind.",
        "Fine.",
        "Got it, thank you.",
    ),
    *("That is good to hear.", "I will not forget it.", "Thank you, I did not know that."),
)
# Replies to a change, which name the new value.
HEARD_CHANGE = (
    "So it is {v} from now on.",
    "I will go by {v} then.",
    "Changed: {v}.",
    "Then {v} replaces what I knew.",
)
ASKING = (
    "",
    "",
    "",
    "",
    "A question: ",
    "Do you remember? ",
    "Tell me, please: ",
    "I forgot something. ",
    "Quick question. ",
)
ANSWERING = (
    "",
    "",
    "",
    "",
    "",
    "You told me: ",
    "As far as I know: ",
    "I remember it: ",
    "From what you said: ",
)
# Answers that are nothing but the value.
BARE = ("{v}.", "It is {v}.", "{v}, as you told me.", "That is {v}.")
BEFORE = (" I mean before it changed.", " Not the newest answer, the one before it.", " What was it earlier?")
WAS = ("Before that it was {v}.", "Earlier it was {v}.", "The one before was {v}.")
UNKNOWN = (
    "You have not told me that.",
    "I do not know; you never said.",
    "I have no answer, since you did not mention it.",
    "That is something you have not told me yet.",
    "I do not know that. You can tell me now.",
    "We have not spoken about that, so I cannot say.",
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
)

# ---- passages, and what is hidden in them -----------------------------------------------------------------------

SHARING = (
    "Here is something I was reading:\n\n",
    "Read this, please:\n\n",
    "I copied this from a book:\n\n",
    "What do you make of these lines?\n\n",
    "For later:\n\n",
    "This is the next part:\n\n",
)
SHARED = ("I have read it.", "Thank you for sharing this.", "Interesting. Go on.", "Read, and kept.", "A good passage.")

SECRETS = ("entry code", "combination", "secret number", "passcode", "password", "PIN", "watchword", "access number")
_PLACES = (
    "vault archive greenhouse boathouse cellar observatory studio workshop pantry stable library annex gallery "
    "laboratory chapel attic shed depot"
)
PLACES = tuple(_PLACES.split())
HIDDEN = (
    "The {secret} is {v}. Keep it well.",
    "Take note that the {secret} is {v}.",
    "Of everything here only this matters: the {secret} is {v}.",
    "{v} is the {secret}. You will be asked for it.",
    "Learn this by heart. The {secret} is {v}.",
)
SOUGHT = (
    "What was the {secret}?",
    "Which {secret} was given?",
    "Do you recall the {secret}?",
    "Say the {secret}.",
    "What is the {secret}?",
)
FOUND = ("The {secret} is {v}.", "The {secret} was {v}.", "It says that the {secret} is {v}.")
# A line of a list, a question for it, an answer.
LISTED = (
    ("{k} stands for {v}.", "What does {k} stand for?", "{k} stands for {v}."),
    ("Entry {k} is {v}.", "What is entry {k}?", "Entry {k} is {v}."),
    ("Under {k} I keep {v}.", "What do I keep under {k}?", "Under {k} you keep {v}."),
    ("{k} means {v}.", "What does {k} mean?", "{k} means {v}."),
    ("Box {k} holds {v}.", "What does box {k} hold?", "Box {k} holds {v}."),
    ("Record {k}: {v}.", "What does record {k} say?", "Record {k}: {v}."),
    ("The label of {k} is {v}.", "Which label does {k} have?", "The label of {k} is {v}."),
)
LISTING = ("Some entries to remember. ", "My list: ", "", "Here are a few records. ", "Please file these. ")
QUOTING = (
    "In what I shared, which sentence comes right after “{k}”?",
    "Quote the sentence that follows “{k}”.",
    "After the words “{k}”, how does the text go on?",
)
QUOTED = ("“{v}”", "It goes on: “{v}”", "The next sentence is: “{v}”")
