"""Make the sample data: nine small files of our own text in the course's exact format, and some additional sources.

A fresh clone trains on these files. Every sentence comes from the tables and templates below, so
there is nothing to license. Labels follow from the words: five levels of sentiment, questions that
ask the same or not, and scenes whose similarity grows with the slots on which they agree.

How to read a table: `,` divides concepts, `/` synonyms of one concept, `~` two forms of a word
(`{verb}` and `{verb~}`), `;` groups of related concepts. Concepts after a `|` are held out: they
occur in dev and test only, so that a model which memorises training words does badly there.

    python data/make_sample.py --output_dir data/sample
    python data/make_sample.py --check
"""

import argparse
import csv
import functools
import hashlib
import io
import os
import re
import sys
from pathlib import Path
from random import Random
from typing import NamedTuple

SPLITS = ("train", "dev", "test-student")
SIZES = {"sst": (1600, 300, 300), "quora": (2000, 400, 400), "sts": (1200, 300, 300)}  # rows per split
DUPLICATE_RATE = 0.375  # that of the course's quora-dev.csv
HELD_OUT_RATE = 0.75  # how often dev and test fill a slot with a held-out concept
MAX_INDEX = {"quora": 404_290, "sts": 8_628}  # the course numbers pairs by their place in the full release
EXTRA_SIZE = 100  # rows of each file of an additional source
MAX_TRIES = 1000  # per row, before we say that the templates are used up

# ---------------------------------------------------------------- sentiment: words and templates

SENTIMENT_TABLES = """
film: film, movie, picture, drama, thriller, comedy, sequel | remake, western, documentary, biopic, musical
film_maker: director, leading man, leading lady, screenwriter | filmmaker, cinematographer, stuntman
film_part: plot, script, acting, dialogue, ending, camerawork | screenplay, editing, finale, casting, costume design
book: book, novel, memoir, story, biography | paperback, novella, saga, autobiography
book_maker: author, writer, narrator, translator | novelist, storyteller, poet, essayist
book_part: plot, prose, opening chapter, dialogue, ending, title story | epilogue, narration, imagery, preface, subplot
restaurant: restaurant, cafe, bistro, diner, pizzeria | brasserie, steakhouse, tavern, canteen, teahouse
restaurant_maker: chef, waiter, owner, manager | sommelier, hostess, barista, pastry cook
restaurant_part: food, service, menu, dessert, coffee, wine list | cuisine, decor, seafood, bread, lasagna
concert: concert, show, gig, recital, performance | festival, symphony, opera, jam session
concert_maker: singer, pianist, conductor, guitarist | drummer, soprano, violinist, saxophonist
concert_part: sound, lighting, singing, set list, opening number | orchestration, stagecraft, percussion, encore, ballad
game: game, shooter, puzzle game, racing game, platform game | simulator, adventure, arcade classic, fighter
game_maker: designer, developer, publisher, level designer | programmer, animator, composer
game_part: gameplay, story, artwork, combat, level design, music | interface, animation, multiplayer mode, tutorial, boss fight
great: superb, brilliant, magnificent, wonderful, outstanding, flawless, unforgettable, extraordinary, amazing, perfect, fantastic | sublime, breathtaking, phenomenal, exquisite, masterful, stunning, glorious, spectacular, impeccable, marvellous, dazzling
good: good, pleasant, nice, enjoyable, solid, charming, attractive, appealing, likable, admirable | agreeable, satisfying, pleasing, commendable, worthwhile, respectable, inviting, engaging, diverting
fair: average, ordinary, passable, middling, okay, tolerable, standard, unremarkable | so-so, run-of-the-mill, adequate, typical, acceptable, routine, nondescript, conventional
poor: weak, dull, bland, disappointing, uninspired, forgettable, boring, lifeless, poor, unconvincing | tedious, lacklustre, underwhelming, drab, insipid, tiresome, feeble, subpar, mediocre, second-rate, humdrum
awful: terrible, awful, horrible, atrocious, unbearable, dreadful, disastrous, pathetic, hideous, disgusting | abysmal, appalling, ghastly, excruciating, wretched, revolting, abominable, horrendous, vile, deplorable
noun4: triumph, masterpiece, joy, treasure, marvel | delight, gem, revelation, tour de force, work of genius
noun3: pleasure, success, nice surprise, good choice | treat, welcome change, sound investment
noun2: mixed bag, normal affair, standard effort | safe compromise, halfway house, formulaic exercise
noun1: letdown, disappointment, bore, missed opportunity | dud, slog, chore, anticlimax, flop
noun0: disaster, catastrophe, insult, nightmare, complete failure | fiasco, abomination, travesty, debacle, disgrace
verb4: adore, love, will always treasure | cherish, worship, am in awe of
verb3: like, enjoy, appreciate | am fond of, admire, have a soft spot for
verb2: have no strong feelings about, can take or leave, am undecided about | am indifferent to, am in two minds about, feel neutral about
verb1: do not care for, do not see the point of, soon tired of | was unmoved by, yawned through, grew weary of
verb0: hate, loathe, cannot stand | detest, despise, abhor
deed4: deserves every award, works miracles, is at the very top of the craft, is a genius | astonishes us all, is a virtuoso, earns a standing ovation, shines brighter than ever
deed3: does a good job, clearly cares, knows how to please, has some clever ideas | holds our interest, shows promise, brings real warmth, has a light touch
deed2: does the usual things, takes few risks, follows the rules | sticks to the formula, plays it safe, treads familiar ground
deed1: seems tired, runs out of ideas, never finds a rhythm, could do better | struggles, looks lost, goes through the motions, lacks conviction
deed0: should be ashamed, ruins everything, has no talent at all, insults us all | botches every moment, disgraces the profession, is an utter fraud, deserves to be fired
clause4: I was smiling from start to finish, I have told all my friends about it, I wanted it never to end, nobody should miss it, it made my whole year | I was moved to tears of happiness, my heart soared, the whole room burst into applause, I am still glowing with joy
clause3: I left in a good mood, I would recommend it, it was worth the money, I was glad of my choice | I came away content, it brightened my evening, I would gladly return, my companions were happy too
clause2: I could say the same of most others, it does what it says, you get what you expect | it left me neither thrilled nor upset, it fills the time, opinions will differ
clause1: I kept looking at my watch, my mind wandered, I expected more, I would not bother again | I stifled a few yawns, my patience wore thin, I regretted not staying home, I was hoping for better
clause0: I wanted my money back, I felt cheated, nobody should have to suffer this, it made me angry, I could not wait for it to end | I was seething, I demand a refund, it ought to be banned, I left in disgust, it was pure torture
utterly: absolutely, utterly, simply, truly | positively, downright
very: incredibly, exceptionally, unbelievably, extremely | immensely, astonishingly, remarkably
rather: fairly, rather, quite, somewhat | reasonably, moderately, comparatively
opener: honestly, all in all, to be fair, on the whole, to tell the truth, looking back | frankly, when all is said and done, in the final analysis, in hindsight
"""

# For labels 0 to 4: what `{adj}` and `{opposite}` stand for. `very` lifts a mild word to the extreme.
ADJECTIVES = (
    ("{awful}", "{utterly} {awful}", "{very} {poor}"),
    ("{poor}", "{rather} {poor}"),
    ("{fair}", "{rather} {fair}"),
    ("{good}", "{rather} {good}"),
    ("{great}", "{utterly} {great}", "{very} {good}"),
)
OPPOSITES = ("{great}", "{good}", "", "{poor}", "{awful}")

# Each block begins with the labels that it serves: most templates say nothing about the label.
SENTIMENT_BLOCKS = """
0 1 2 3 4
this is a {adj} {work} from a {adj} {maker}.
the {maker} has given us a {adj} {work}, and {clause}.
this {work} is {adj}; {clause}.
the {part} is {adj} and so is the {part2}.
every part of this {work}, from the {part} to the {part2}, is {adj}.
the {maker} {deed}, and {clause}.
I {verb} this {work}; the {part} is {adj}.
the {part} is {adj}, and the {maker} {deed}.
this {work} is a {noun}, and the {maker} {deed}.
there's no other way to say it: the {part} is {adj}.
my friends and I agree that the {work} is {adj} and the {part} {adj}.
I came without expectations and found a {noun}.
it's a {noun}; the {part} is {adj}, and {clause}.
those who ask me about the {part} will hear that it's {adj}.

0 1 3 4
I expected a {opposite} {work} and got a {noun} instead.
I thought the {part} would be {opposite}, but it's {adj}.
forget what they say about the {opposite} {part}: this {work} is {adj}.
there is nothing {opposite} about this {work}; the {part} is {adj}.
the last {work} was {opposite}, but this one is {adj}, and {clause}.

1 3
this {work} isn't {opposite} at all.
the {part} is not {opposite} at all, and the {maker} {deed}.
the {part} is {opposite}, but the {work} as a whole is {adj}.
the {part} is far from {opposite}, and {clause}.
I {verb} this {work}, though the {part} is {opposite}.
even the {opposite} {part} can't hide that the {work} is {adj}.

2
the {part} is {good} but the {part2} is {poor}, so it evens out.
neither {good} nor {poor}, this {work} is {adj}.
some will call this {work} {great} and some will call it {awful}; {clause}.
this {work} isn't {awful}, but it isn't {good} either.
one half of this {work} is {good}, the other half is {poor}.
for every {good} moment in this {work} there is a {poor} one.
it's {adj}, no better and no worse than any other {work}.
"""

# ---------------------------------------------------------------- paraphrase: words and templates

QUESTION_TABLES = """
city: London, Paris, Berlin, Madrid, Rome, Tokyo, Chicago, Toronto, Mumbai, Cairo, Sydney, Boston | Lisbon, Oslo, Nairobi, Seoul, Vienna, Dublin, Lima, Warsaw, Manila, Athens, Havana
country: France, Japan, India, Canada, Brazil, Germany, Italy, Mexico, Australia, Spain | Norway, Kenya, Peru, Thailand, Greece, Portugal, Vietnam, Morocco, Iceland, Chile
manner: cheapest/least expensive, fastest/quickest, safest, most scenic/most beautiful | greenest/most eco-friendly, easiest/simplest, most comfortable/most relaxing
season: cheapest/least expensive, most pleasant/nicest, quietest/least crowded, warmest/hottest | driest/least rainy, coolest/least hot, sunniest
language: English, Spanish, French, German, Japanese, Hindi, Russian | Korean, Arabic, Polish, Swahili, Turkish, Dutch
format: Word, PDF, Excel, JPEG, PNG | EPUB, PowerPoint, GIF, CSV, Markdown
currency: euros, dollars, pounds, yen, rupees | pesos, francs, rubles, kroner, shekels
sport: football, cricket, tennis, hockey, rugby, baseball | volleyball, badminton, golf, handball, boxing, squash
job: nurse, teacher, lawyer, pilot, engineer, journalist, doctor/physician, plumber | dentist, architect, surgeon, electrician, librarian, pharmacist, carpenter, hairdresser
person: boss/manager, neighbour, sister, brother, teacher, best friend, roommate/flatmate, mother | landlord, cousin, coworker/colleague, grandfather, stepmother, nephew, daughter-in-law, mentor
ingredient: butter, oil, cream, milk, sugar, honey, yogurt | margarine, buttermilk, molasses, ghee, syrup, lard, coconut flour
dish: pancakes, soup, pizza, curry, a cake, an omelette | lasagna, dumplings, waffles, muffins, a pie, a stew
skill: play the guitar, swim, code/program, draw, cook, sing, drive, ski, speak in public/give speeches | surf, juggle, knit, skate, meditate, sew, whistle, play poker
subject: physics, chemistry, economics, statistics, history, biology, philosophy, law | astronomy, psychology, geology, linguistics, algebra, genetics, theology, geometry
level: beginners/newcomers, experts/specialists, children/kids | retirees/pensioners, undergraduates, toddlers
material: book/textbook, online course/web course, video series, podcast | magazine, lecture series, documentary, blog
pet: dog, cat, rabbit, horse, parrot | hamster, guinea pig, goldfish, turtle, ferret, canary
food: grapes, chocolate, cheese, bread, rice, carrots, peanuts, apples | avocados, mushrooms, almonds, strawberries, spinach, lentils, blueberries
when: every day/daily, before bed/right before sleeping, after a workout/after exercise | on an empty stomach, at breakfast/in the morning, during pregnancy/while pregnant
stain: red wine, coffee, ink, blood, gravy | mustard, rust, wax, lipstick, turmeric, glue
surface: carpet, shirt, sofa/couch, leather jacket, tablecloth | rug, curtain, mattress, wool coat, cushion, backpack
ailment: headache, sore throat, cough, fever, toothache, rash | migraine, nosebleed, earache, blister, cramp, sunburn
plant: tomatoes, roses, potatoes, herbs, beans, lemons | orchids, cucumbers, tulips, peppers, daffodils, pumpkins
garden: on a balcony, in the shade, in a pot, in sandy soil, indoors/inside the house | in a greenhouse, in clay, on a windowsill, on a rooftop, near the sea/by the coast
device: laptop/notebook, phone/mobile phone, printer, tablet, television/TV, camera | smartwatch, router, headset, projector, scanner, games console
trouble: overheat/get too hot, keep freezing, turn itself off/shut down by itself, make a loud noise | crash so often, drain its battery, flicker, smell of smoke/smell burnt, vibrate
habit: biting my nails, smoking, eating sugar, staying up late/going to bed late, being late for work | snacking at night, swearing/using bad language, gambling/betting, oversleeping, grinding my teeth, gossiping
invention: telephone, steam engine, light bulb, printing press, bicycle, camera, radio | compass, zipper, elevator, parachute, typewriter, thermometer, telescope, dishwasher
hobby: fishing, photography, cooking, gardening, cycling, hiking, painting, chess | pottery, birdwatching, sailing, knitting, origami, archery, calligraphy
idiom: break the ice, a piece of cake, bite the bullet, hit the sack, under the weather, spill the beans, on thin ice, out of the blue, let the cat out of the bag | cut corners, burn bridges, miss the boat, pull strings, jump the gun, costs an arm and a leg, a wild goose chase, hit the jackpot, beat around the bush
goal: lose weight/slim down, gain weight/put on weight, build muscle/become stronger, save money/put money aside | burn fat, grow my hair/get longer hair, memorise a thousand words, double my income, straighten my posture
period: a month/thirty days, six weeks, a year/twelve months, ten days | a fortnight/two weeks, one summer, half a decade, a weekend
service: Facebook, Gmail, Instagram, Twitter | LinkedIn, Snapchat, Pinterest, Reddit
account_act: recover/get back, delete/permanently remove, rename/change the name of, protect/secure | suspend/temporarily disable, verify/confirm, transfer/hand over
exam: driving test, bar exam, chemistry exam, spelling test | citizenship test, piano exam, entrance examination, eye test, fitness assessment
home: flat/apartment, house, garage, studio | cottage, bungalow, villa, houseboat, warehouse, penthouse
software: Python, Firefox, Skype, Photoshop | Blender, Inkscape, LibreOffice, Audacity, Docker
system: Windows, a Mac, Linux | Ubuntu, a Chromebook, an iPad, FreeBSD
how_to: how do I, how can I, how should I, what is the best way to | what is a good way to, is there an easy way to, what steps do I need to take to
"""

# Each block is a family of questions: its slots and their tables, then one intent a line with its
# phrasings divided by ` = `. Two phrasings of an intent with the same fillers are duplicates.
# `swap`: exchanging a and b gives another question; `same`: it gives the same question.
QUESTION_BLOCKS = """
[a:city b:city how:manner swap]
what is the {how} way to get from {a} to {b}? = I want to go from {a} to {b}. What is the {how} way to do it? = which is the {how} route from {a} to {b}? = what is the {how} way of travelling to {b} from {a}?
what documents do I need to move from {a} to {b}? = which papers are required if I leave {a} and settle in {b}?

[a:city b:city same]
how far is {a} from {b}? = what is the distance between {a} and {b}? = how many kilometres is it from {a} to {b}?
how long is the flight between {a} and {b}? = how many hours does it take to fly from {a} to {b}?

[a:language b:language swap]
what is the best app for translating {a} into {b}? = which app should I use to turn {a} text into {b}? = is there a good tool that translates from {a} to {b}?
how hard is it for a speaker of {a} to learn {b}? = I speak {a}. How difficult would it be to study {b}? = is {b} difficult to learn for people who speak {a}?

[a:format b:format swap]
{how_to} convert {a} files to {b}? = {how_to} turn a file in {a} format into {b} format? = I have a file in {a} format. {how_to} save it as {b}?
why does the layout change when I convert {a} files to {b}? = changing {a} files into {b} breaks my layout. What is the reason?

[a:currency b:currency swap]
where can I exchange {a} for {b} at a good rate? = what is the best place to change {a} into {b}? = I have {a} and need {b}. Where should I exchange them?
will {a} gain value against {b} this year? = are {a} going to get stronger compared with {b} this year?

[a:sport b:sport c:country swap]
why is {a} more popular than {b} in {c}? = why do people in {c} prefer {a} to {b}? = what makes {a} a bigger sport than {b} in {c}?
can playing {a} make me better at {b}? = will I improve at {b} if I play {a}? = does training in {a} help with {b}?

[a:job b:job swap]
how can a {a} become a {b}? = what is the best way to switch from working as a {a} to working as a {b}? = I am a {a} and would like to be a {b}. How do I change careers?
does a {a} earn more than a {b}? = is the salary of a {a} higher than that of a {b}?

[a:person b:person swap]
how do I tell my {a} that I am angry with my {b}? = I am upset with my {b}. How should I explain this to my {a}? = what should I say so that my {a} understands why I am mad at my {b}?
why does my {a} dislike my {b}? = what could be the reason that my {a} cannot stand my {b}?
is it rude to invite my {a} to a party without asking my {b}? = should I invite my {a} to my party if I do not want my {b} to come?

[a:ingredient b:ingredient c:dish swap]
can I use {a} instead of {b} when I make {c}? = is it possible to replace {b} with {a} when cooking {c}? = I have no {b} left. Will {a} do as a substitute when I make {c}?
should I add the {a} before the {b} when I make {c}? = when cooking {c}, does the {a} go in earlier than the {b}?

[a:skill]
how long does it take to learn to {a}? = how many months do most people need to learn to {a}? = how much time will I need before I can {a} well?
how much does it cost to learn to {a}? = what do lessons cost if I want to learn to {a}?
am I too old at thirty to start learning to {a}? = can an adult of thirty still learn to {a}?

[a:subject b:level c:material]
which {c} about {a} is best for {b}? = can you recommend a {c} on {a} for {b}? = what is a good {a} {c} for {b}?
why do {b} find {a} so difficult? = what makes {a} so hard for {b}?

[a:job c:country]
how much does a {a} earn in {c}? = what is the average salary of a {a} in {c}? = what do people in {c} get paid for working as a {a}?
how do I become a {a} in {c}? = what training do I need to work as a {a} in {c}? = what does it take to be a {a} in {c}?
how difficult is it for a {a} to get hired in {c}? = is it hard to find a job as a {a} in {c}?

[a:pet b:food]
can a {a} eat {b}? = is it safe to feed {b} to a {a}? = is it all right if my {a} eats {b}?
why does my {a} refuse to eat {b}? = my {a} will not touch {b}. What is the reason?

[a:stain b:surface]
{how_to} remove {a} from a {b}? = {how_to} get {a} out of a {b}? = there is {a} on my {b}. {how_to} clean it?
does {a} leave a permanent mark on a {b}? = will {a} ruin a {b} forever?

[a:ailment]
what causes a {a}? = why do people get a {a}? = what are the usual reasons for a {a}?
how do you cure a {a} at home? = what is a good home remedy for a {a}? = {how_to} get rid of a {a} without medicine?
when should I see a doctor about a {a}? = how bad must a {a} be before I go to a doctor?

[a:plant b:garden]
{how_to} grow {a} {b}? = I would like to grow {a} {b}. How do I begin? = what do {a} need to grow well {b}?
why are my {a} dying {b}? = what is killing the {a} that I keep {b}?
how often should I water {a} {b}? = how much water do {a} need {b}?

[a:device b:trouble]
why does my {a} {b}? = what makes my {a} {b}?
is it worth repairing a broken {a}? = my {a} is broken. Should I repair it or buy a new one?
which {a} should I buy if I want one that does not {b}? = can you recommend a {a} that will not {b}?

[c:country how:season]
which is the {how} time of year to visit {c}? = which month is the {how} for a trip to {c}? = I am planning to go to {c}. When is it {how} there?
do I need a visa to visit {c}? = is a visa required for a trip to {c}?
is it safe for a woman to travel alone in {c}? = can women travel through {c} safely on their own?

[a:habit]
{how_to} stop {a}? = what helps people to give up {a}? = I am tired of {a}. How do I quit?
why is it so hard to stop {a}? = what makes it so difficult to give up {a}?
how harmful is {a}? = what harm does {a} do to me?

[a:invention]
who invented the {a}? = who came up with the idea of the {a}? = which inventor gave us the {a}?
when was the {a} invented? = in which year did the {a} first appear?
how does a {a} work? = can someone explain the way a {a} works?

[a:person b:hobby]
what is a good gift for my {a} who loves {b}? = my {a} is fond of {b}. What present should I choose? = what should I buy for a {a} who is interested in {b}?
how can I get my {a} interested in {b}? = {how_to} persuade my {a} to try {b}?

[a:person]
should I lend money to my {a}? = is it a good idea to lend my {a} money? = my {a} wants a loan from me. Should I agree?
should I borrow money from my {a}? = is it a good idea to ask my {a} for a loan?
how do I get back the money that my {a} owes me? = my {a} has not repaid me. How do I ask for my money?

[a:idiom]
what does "{a}" mean? = what is the meaning of "{a}"? = what do people mean when they say "{a}"?
where does the expression "{a}" come from? = what is the origin of "{a}"?
{how_to} use "{a}" in a sentence? = can you give me an example sentence with "{a}"?

[a:dish b:ingredient]
how can I make {a} without {b}? = what is a good recipe for {a} that contains no {b}? = I must not eat {b}. How do I cook {a}?
how can I make {a} with a lot of {b}? = what is a good recipe for {a} that contains plenty of {b}? = I love {b}. How do I cook {a} with it?

[a:goal b:period]
{how_to} {a} in {b}? = what should I do to {a} within {b}? = is there a plan that helps me to {a} in {b}?
is it bad for me to {a} in {b}? = is there a risk if I try to {a} within {b}?

[a:service b:account_act]
{how_to} {b} my {a} account? = {how_to} {b} an account that I have on {a}?
why was my {a} account blocked? = for what reason would {a} block my account?

[a:food b:when]
is it healthy to eat {a} {b}? = is eating {a} {b} good for me? = does eating {a} {b} do me any good?
why should I not eat {a} {b}? = what is bad about eating {a} {b}?

[a:exam]
{how_to} prepare for a {a}? = {how_to} get ready for a {a}?
what happens if I fail a {a}? = what are my options after failing a {a}?
is it possible to pass a {a} without preparing? = can I get through a {a} with no preparation?

[a:home b:city]
is it better to rent or to buy a {a} in {b}? = should I buy a {a} in {b} or would renting be wiser?
what is the average price of a {a} in {b}? = how much does a {a} cost in {b}?
{how_to} sell a {a} in {b} quickly? = what is the fastest way to find a buyer for a {a} in {b}?

[a:software b:system]
{how_to} install {a} on {b}? = {how_to} set up {a} on {b}?
{how_to} uninstall {a} on {b}? = {how_to} remove {a} from {b} completely?
why does {a} run slowly on {b}? = what makes {a} so slow on {b}?

[c:country]
how many people live in {c}? = what is the population of {c}? = how large is the population of {c}?
how big is {c} in square kilometres? = what is the area of {c}? = how much land does {c} cover?
what is the main religion in {c}? = which faith is the most common in {c}?
"""

# ---------------------------------------------------------------- similarity: words and templates

SCENE_TABLES = """
people: a man/a guy, two men, an old man/an elderly man | a fireman, three fishermen; a woman/a lady, two women, a young woman | a grandmother/a granny, a waitress; a boy, a girl, a child/a kid, some children/some kids | a toddler, two teenagers, a baby/an infant; a chef/a cook, a farmer, a soldier, a student | a mechanic, a sailor, a nun, two clowns
animal: dog, cat/kitty, rabbit/bunny | hamster, puppy, kitten; horse/pony, cow, sheep | goat, donkey/mule, pig/hog; monkey, bear, elephant | tiger, kangaroo, fox; duck, bird | goose, parrot, owl
handle: playing~played, tuning~tuned | testing~tested; repairing~repaired/fixing~fixed, cleaning~cleaned | polishing~polished, dusting~dusted; carrying~carried, holding~held | lifting~lifted, dragging~dragged/pulling~pulled; selling~sold, buying~bought/purchasing~purchased | stealing~stolen, inspecting~inspected/examining~examined
instrument: guitar, violin/fiddle | cello, harp, banjo; flute, trumpet | saxophone, clarinet; drum, piano | xylophone, church organ
drive: driving~driven, parking~parked | towing~towed, steering~steered; washing~washed/cleaning~cleaned, painting~painted | waxing~waxed, spraying~sprayed; repairing~repaired/fixing~fixed | dismantling~dismantled/taking apart~taken apart; photographing~photographed, selling~sold | renting~rented/hiring~hired, inspecting~inspected/examining~examined
vehicle: car/automobile, taxi/cab, van | limousine, ambulance; truck/lorry, bus/coach | tractor, bulldozer, fire engine; motorcycle/motorbike | scooter/moped, go-kart; boat/ship | yacht, ferry
prepare: slicing~sliced/cutting~cut, serving~served | chopping~chopped, garnishing~garnished; cooking~cooked/preparing~prepared, heating~heated | microwaving~microwaved, seasoning~seasoned; eating~eaten | tasting~tasted, nibbling~nibbled; weighing~weighed, buying~bought/purchasing~purchased | wrapping~wrapped, freezing~frozen
foodstuff: carrot, onion, potato | pepper, cucumber, aubergine/eggplant; apple, banana, orange | mango, pineapple, peach; chicken, fish | lobster, turkey, sausage; cake, pie | omelette, waffle
move: sleeping/taking a nap, sitting | yawning, resting/lying down; running/racing, walking | limping, crawling; jumping/leaping, playing | rolling around, climbing; eating, drinking | chewing, digging
act: dancing, singing | whistling, clapping; running/jogging, walking/strolling | skating, limping; sleeping/taking a nap, sitting | kneeling, yawning; laughing, crying/weeping | shivering, sneezing; reading, writing | sketching, sewing
outdoors: on the beach/by the sea, by the river/near the river | beside the lake, at the pond; in the park, in the garden/in the yard | in the meadow/in the field, in the forest/in the woods; in the street/on the road, at the station | on the pavement/on the sidewalk, in the square; in the snow, in the rain | in the fog/in the mist, in the moonlight
indoors: in the kitchen, in the dining room | in the pantry, in the bakery; in the living room/in the lounge, in the bedroom | in the attic/in the loft, in the hallway; in a workshop, in a garage | in the basement/in the cellar, in a barn; in a classroom, in an office | in a library, in a museum
size: small/little | tiny; large/big | huge/enormous
look: small/little | tiny; large/big | huge/enormous; old, new | antique, shabby; red, white | purple, grey
coat: black, white, brown | grey, spotted; small/little | tiny; large/big | huge/enormous; young, old | plump/fat, skinny/thin
event: bus crash, train crash/rail crash | plane crash, ferry accident; factory fire/factory blaze, mine explosion/mine blast | warehouse inferno, pipeline rupture; earthquake/quake, flood | landslide/mudslide, avalanche, tornado/twister
harm: kills~killed | crushes~crushed; injures~injured/wounds~wounded | maims~maimed, hospitalises~hospitalised; traps~trapped | strands~stranded, displaces~displaced, endangers~endangered
number: two, three | four, a pair of; twelve, fifteen | eighteen, nineteen; thirty, fifty | ninety, sixty; hundreds of | thousands of, scores of
victim: workers, teachers, students/pupils | miners, lorry drivers, clerks; tourists/holidaymakers, passengers/travellers | pilgrims, commuters; people, children/kids | villagers, refugees
land: France, Germany, Spain, Italy | Norway, Portugal, Poland; China, Japan, India | Nepal, Vietnam, Thailand; Brazil, Mexico, Canada | Peru, Chile, Cuba; Egypt, Iran, Nigeria | Kenya, Syria, Yemen
decide: accepts~accepted/agrees to~agreed to, welcomes~welcomed | hails~hailed, backs~backed; rejects~rejected/turns down~turned down, delays~delayed/postpones~postponed | scraps~scrapped/cancels~cancelled, suspends~suspended; proposes~proposed/suggests~suggested, discusses~discussed | outlines~outlined, reviews~reviewed
deal: trade deals/trade agreements, arms deals/weapons deals | fishing pacts, customs treaties; peace talks, border talks | ceasefire negotiations, disarmament negotiations; climate plans, energy plans | vaccine programmes, satellite projects
firm: bank/lender | insurer, stockbroker; airline, rail company | bus operator, shipping line; carmaker/car company, oil company | steelmaker, drug maker; supermarket chain, clothing store | brewery, hotel group, bookseller
figure: profits/earnings, losses | dividends, reserves; sales/revenues, orders | exports, subscriptions; costs/expenses, debts | taxes, wages/salaries
change: rose/climbed/increased | surged/soared, doubled; fell/dropped/declined | plunged/tumbled, halved; were flat/did not change | stagnated, stabilised
quarter: in the first quarter, in the second quarter | in the final quarter; last year/over the past year, last month | last week, over the past decade; in March, in June | in August, in December
contest: the final, the opening match/the first match | the semi-final, the playoffs; a friendly/a friendly match | a charity game, an exhibition game; the world championship/the world cup, the regional cup | the Olympic tournament, the youth league
beat: beat/defeated | thrashed/crushed, edged past; drew with/tied with | squared off with, were held by; will play/will meet, will host | will challenge, will visit
weather: rain/rainfall, snow/snowfall | sleet, hail, drizzle; wind, a storm | thunder, a hurricane; sunshine, heat/hot weather | mild air, a warm spell; fog/mist | frost, smog
region: in the north, in the south | in the west, in the northeast; on the coast/along the shore | on the islands, across the bay; in the mountains/in the hills | in the valleys, in the highlands; in the capital, in the cities | in the suburbs, in the villages
time: tomorrow, tonight/this evening | at dawn/at sunrise, at noon/at midday; on Monday, on Friday | on Tuesday, by Thursday; this weekend, next week | in a fortnight, all month
keep: clean, wash | scrub, disinfect; check/inspect, test | measure, calibrate; lock, close/shut | seal, bolt; replace/change, remove | upgrade, discard/throw away; paint | varnish/lacquer, decorate
household: door, window | gate, skylight; heater, oven/stove | boiler, chimney; lamp, radio | smoke alarm, doorbell; roof, wall | gutter, fence; sink, bathtub | toilet, faucet/tap
often: every week/weekly, every month/monthly | every fortnight, twice a day; once a year/yearly, every spring | every autumn/every fall, each decade; before you leave/before going out, before bed | before a holiday/before a vacation, at bedtime
"""

# Each block is a kind of scene: slot:table=weight, then its templates, which may leave slots out.
# Several headers in a row share the templates.
SCENE_BLOCKS = """
[agent:people=3 verb:handle=3 object:instrument=3 place:indoors=1.5 look:look=1]
[agent:people=3 verb:drive=3 object:vehicle=3 place:outdoors=1.5 look:look=1]
[agent:people=3 verb:prepare=3 object:foodstuff=3 place:indoors=1.5 look:size=1]
{agent} {be} {verb} a {object}.
{agent} {be} {verb} a {look} {object}.
{agent} {be} {verb} a {object} {place}.
{place}, {agent} {be} {verb} a {object}.
there {be} {agent} {verb} a {object} {place}.
a {object} is being {verb~} by {agent}.
a {look} {object} is being {verb~} by {agent} {place}.
{agent} {was} {verb} a {object} {place}.
the picture shows {agent} {verb} a {object} {place}.
the photo shows {agent} {verb} a {look} {object}.

[animal:animal=3 verb:move=3 place:outdoors=2 coat:coat=1]
a {coat} {animal} is {verb} {place}.
a {animal} is {verb} {place}.
{place}, a {animal} is {verb}.
there is a {coat} {animal} {verb} {place}.
a {animal} was {verb} {place}.
the picture shows a {animal} {verb} {place}.

[agent:people=3 verb:act=3 place:outdoors=2]
[agent:people=3 verb:act=3 place:indoors=2]
{agent} {be} {verb} {place}.
{place}, {agent} {be} {verb}.
there {be} {agent} {verb} {place}.
{agent} {was} {verb} {place}.
the photo shows {agent} {verb} {place}.

[event:event=3 harm:harm=3 number:number=1.5 victim:victim=2 land:land=2]
{event} {harm} {number} {victim} in {land}
{event} in {land} {harm} {number} {victim}
{number} {victim} {harm~} in {event} in {land}
a {event} has {harm~} {number} {victim} in {land}.
{land}: {number} {victim} {harm~} in {event}
{number} {victim} were {harm~} in a {event} in {land}, officials said.

[a:land=2 verb:decide=3 deal:deal=3 b:land=2]
{a} {verb} {deal} with {b}
{deal} with {b} {verb~} by {a}
the government of {a} has {verb~} {deal} with {b}.
{a} has {verb~} {deal} with {b}, a minister said.
newspapers report that {a} {verb} {deal} with {b}.

[firm:firm=3 figure:figure=3 change:change=3 quarter:quarter=2]
the {figure} of the {firm} {change} {quarter}.
{quarter}, the {figure} of the {firm} {change}.
the {firm} said that its {figure} {change} {quarter}.
{figure} at the {firm} {change} {quarter}.

[a:land=2 verb:beat=3 b:land=2 contest:contest=3]
{a} {verb} {b} in {contest}.
{a} {verb} {b} in {contest}, a spokesman said.
in {contest}, {a} {verb} {b}.

[weather:weather=3 region:region=3 time:time=3]
{weather} is expected {region} {time}.
{time}, {weather} is expected {region}.
forecasters expect {weather} {region} {time}.
there will be {weather} {region} {time}.

[verb:keep=3 object:household=3 often:often=3]
you should {verb} the {object} {often}.
it is a good idea to {verb} the {object} {often}.
remember to {verb} the {object} {often}.
my advice is to {verb} the {object} {often}.
"""

RELATED_AGREEMENT = 0.45  # another concept of the same group; synonyms agree fully
UNSAID_AGREEMENT = 0.6  # only one of the sentences says it
SCORE_POWER = 1.4  # above 1: people punish the first differences most
SCORE_NOISE = 0.15  # half-width, in points of the 0-5 scale
SAME_KIND_SCORE = 0.4  # two scenes of one kind that agree on nothing; of two kinds: 0
NUM_CANDIDATES = 15  # second scenes tried for a pair; the one nearest to its target score is kept


class Concept(NamedTuple):
    words: tuple[str, ...]  # synonyms
    group: int  # concepts of one group are related


class Block(NamedTuple):
    tables: dict[str, str]  # slot -> name of its table
    weights: dict[str, float]  # slot -> weight (scenes only)
    exchange: str  # questions only: what exchanging a and b does, "swap", "same" or "" for neither
    lines: list[list[str]]  # an intent's phrasings a line; in scenes one template a line


class Row(NamedTuple):
    texts: tuple[str, ...]  # one sentence, or the two of a pair
    label: str


# ---------------------------------------------------------------- reading and filling


@functools.cache
def read_tables() -> dict[str, list[tuple[list[Concept], list[Concept]]]]:
    """Each table's groups as (concepts for all splits, held-out concepts)."""
    tables = {}
    for line in (SENTIMENT_TABLES + QUESTION_TABLES + SCENE_TABLES).split("\n"):
        name, _, text = line.partition(": ")
        if name in tables:
            raise ValueError(f"two tables are named {name!r}")
        if name:
            tables[name] = [
                tuple(read_concepts(part, number) for part in group.split("|"))
                for number, group in enumerate(text.split(";"))
            ]
    return tables


def read_concepts(text: str, group: int) -> list[Concept]:
    return [Concept(tuple(concept.strip().split("/")), group) for concept in text.split(",")]


@functools.cache
def read_blocks(text: str) -> list[Block]:
    """Parse QUESTION_BLOCKS or SCENE_BLOCKS."""
    blocks = []
    for paragraph in text.strip().split("\n\n"):
        lines = paragraph.split("\n")
        headers = [line for line in lines if line.startswith("[")]
        phrasings = [line.split(" = ") for line in lines[len(headers) :]]
        for header in headers:
            exchange = re.findall(r"(swap|same)\]", header)
            slots = re.findall(r"(\w+):(\w+)=?([\d.]*)", header)
            tables = {slot: table for slot, table, _ in slots}
            weights = {slot: float(weight) for slot, _, weight in slots if weight}
            blocks.append(Block(tables, weights, "".join(exchange), phrasings))
    return blocks


def draw(rng: Random, table: str, held_out: bool, avoid=()) -> Concept:
    """A concept that is not in `avoid`; held-out ones are only drawn if `held_out`."""
    while True:
        common, unseen = rng.choice(read_tables()[table])
        use_unseen = held_out and rng.random() < HELD_OUT_RATE
        concept = rng.choice(unseen if use_unseen else common)
        if concept not in avoid:
            return concept


def draw_related(rng: Random, table: str, group: int, held_out: bool, avoid=()) -> Concept | None:
    """The same within one group; None if `avoid` holds all of it."""
    common, unseen = read_tables()[table][group]
    concepts = [c for c in common + (unseen if held_out else []) if c not in avoid]
    return rng.choice(concepts) if concepts else None


def draw_slots(rng: Random, tables: dict[str, str], held_out: bool) -> dict[str, Concept]:
    slots = {}
    for slot, table in tables.items():
        slots[slot] = draw(rng, table, held_out, avoid=slots.values())
    return slots


def fill(rng: Random, template: str, slots: dict[str, Concept], held_out: bool) -> str:
    """Fill a template from `slots`, or else by a fresh draw from the table of that name."""
    used = list(slots.values())

    def word(match):
        concept = slots.get(match[1])
        if concept is None:
            concept = draw(rng, match[1], held_out, avoid=used)
            used.append(concept)
        forms = rng.choice(concept.words).split("~")
        return forms[-1] if match[2] else forms[0]

    text = re.sub(r"\{(\w+)(~?)\}", word, template)
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)
    return re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text)


# ---------------------------------------------------------------- rows


@functools.cache
def sentiment_templates(label: int) -> list[str]:
    blocks = [block.split("\n") for block in SENTIMENT_BLOCKS.strip().split("\n\n")]
    return [line for labels, *lines in blocks if str(label) in labels for line in lines]


def make_sentiment(rng: Random, label: int, held_out: bool) -> Row:
    thing = rng.choice(["film", "book", "restaurant", "concert", "game"])
    tables = {"work": thing, "maker": f"{thing}_maker", "part": f"{thing}_part", "part2": f"{thing}_part"}
    slots = draw_slots(rng, tables, held_out)
    template = rng.choice(sentiment_templates(label))
    if rng.random() < 0.3 and not template.startswith("forget"):
        template = "{opener}, " + template
    template = re.sub("{adj}", lambda _: rng.choice(ADJECTIVES[label]), template)
    template = template.replace("{opposite}", OPPOSITES[label])
    template = re.sub("{(noun|verb|deed|clause)}", rf"{{\g<1>{label}}}", template)
    text = fill(rng, template, slots, held_out)
    # The course's sentences are split at punctuation and begin with a space.
    text = re.sub(r"([.,;:!])(?=\s|$)", r" \1", text)
    return Row((" " + re.sub(r"(n't|'s)\b", r" \1", text),), str(label))


def make_question_pair(rng: Random, is_duplicate: bool, held_out: bool) -> Row:
    """Two questions; those that are no duplicates are unrelated or differ in one point."""
    blocks = read_blocks(QUESTION_BLOCKS)
    block = rng.choice(blocks)
    intent = rng.choice(block.lines)
    template, template2 = rng.sample(intent, 2)
    slots = slots2 = draw_slots(rng, block.tables, held_out)
    exchanged = slots | {"a": slots.get("b"), "b": slots.get("a")}
    if is_duplicate:
        if block.exchange == "same" and rng.random() < 0.5:
            slots2 = exchanged
    else:
        change = rng.choice(["swap", "slot", "slot", "intent", "unrelated"])
        if rng.random() < 0.5:
            template2 = template  # a shared wording must not tell the label
        if change == "unrelated":
            block2 = rng.choice([other for other in blocks if other != block])
            slots2 = draw_slots(rng, block2.tables, held_out)
            template2 = rng.choice(rng.choice(block2.lines))
        elif change == "intent":
            template2 = rng.choice(rng.choice([other for other in block.lines if other != intent]))
        elif change == "swap" and block.exchange == "swap":
            slots2 = exchanged
        else:
            slot = rng.choice([slot for slot in slots_in(template) if slot in slots])
            other = draw(rng, block.tables[slot], held_out, avoid=slots.values())
            slots2 = slots | {slot: other}
    text, text2 = fill(rng, template, slots, held_out), fill(rng, template2, slots2, held_out)
    return Row((text, text2), "1.0" if is_duplicate else "0.0")


@functools.cache
def slots_in(template: str) -> list[str]:
    return re.findall(r"\{(\w+)~?\}", template)


def make_scene_pair(rng: Random, target: float, held_out: bool) -> Row:
    """Two sentences whose similarity is near `target`, from 0 to 5.

    The target comes first, so it says nothing about either sentence alone, only about their agreement.
    """
    blocks = read_blocks(SCENE_BLOCKS)
    block = rng.choice(blocks)
    scene = rng.choice(block.lines)[0], draw_slots(rng, block.tables, held_out)
    if target < SAME_KIND_SCORE:
        block2 = rng.choice([other for other in blocks if other.lines != block.lines])
        scene2 = rng.choice(block2.lines)[0], draw_slots(rng, block2.tables, held_out)
        score = 0.0
    else:
        candidates = []
        for _ in range(NUM_CANDIDATES):
            candidate = rng.choice(block.lines)[0], change_slots(rng, block, scene[1], held_out)
            candidates.append((similarity(block, scene, candidate), candidate))
        score, scene2 = min(candidates, key=lambda scored: abs(scored[0] - target))
    score = min(5.0, max(0.0, score + rng.uniform(-SCORE_NOISE, SCORE_NOISE)))
    return Row((write_scene(rng, scene, held_out), write_scene(rng, scene2, held_out)), f"{score:.1f}")


def change_slots(rng: Random, block: Block, slots: dict[str, Concept], held_out: bool) -> dict[str, Concept]:
    """Replace a random share of the slots by a related or by any other concept."""
    changed = dict(slots)
    keep_prob = rng.random()
    for slot, table in block.tables.items():
        if rng.random() < keep_prob:
            continue
        avoid = [slots[slot], *changed.values()]
        related = None
        if rng.random() < 0.5:
            related = draw_related(rng, table, slots[slot].group, held_out, avoid)
        changed[slot] = related or draw(rng, table, held_out, avoid)
    return changed


def similarity(block: Block, scene: tuple, scene2: tuple) -> float:
    """Score from 0 to 5 of two scenes of one kind, each a (template, slots)."""
    total = agreed = 0.0
    for slot, weight in block.weights.items():
        concept, concept2 = (
            slots[slot] if slot in slots_in(said) else None for said, slots in (scene, scene2)
        )
        if concept is None and concept2 is None:
            continue
        if concept is None or concept2 is None:
            agreement = UNSAID_AGREEMENT
        elif concept == concept2:
            agreement = 1.0
        else:
            agreement = RELATED_AGREEMENT if concept.group == concept2.group else 0.0
        total += weight
        agreed += weight * agreement
    return SAME_KIND_SCORE + (5 - SAME_KIND_SCORE) * (agreed / total) ** SCORE_POWER


def write_scene(rng: Random, scene: tuple, held_out: bool) -> str:
    template, slots = scene
    if "agent" in slots:
        is_one = slots["agent"].words[0].startswith(("a ", "an "))
        be, was = ("is", "was") if is_one else ("are", "were")
        slots = slots | {"be": Concept((be,), 0), "was": Concept((was,), 0)}
    return fill(rng, template, slots, held_out)


MAKERS = {"sst": make_sentiment, "quora": make_question_pair, "sts": make_scene_pair}


def plan_labels(rng: Random, task: str, size: int) -> list:
    """What to ask of the task's maker, row by row: balanced, then shuffled."""
    if task == "sst":
        labels = [row % 5 for row in range(size)]
    elif task == "quora":
        labels = [row < DUPLICATE_RATE * size for row in range(size)]
    else:
        labels = [5 * row / (size - 1) for row in range(size)]
    rng.shuffle(labels)
    return labels


def text_key(text: str) -> str:
    """Letters and digits only: sentences that differ elsewhere count as the same."""
    return "".join(re.findall("[a-z0-9]+", text.lower()))


def make_rows(rng: Random, task: str, size: int, held_out: bool, taken: set[str]) -> list[Row]:
    """Different rows that share no sentence with `taken`, the keys of the splits made before.

    Raises:
        ValueError: if the templates and words do not suffice for `size` rows.
    """
    rows, seen = [], set()
    for label in plan_labels(rng, task, size):
        for _ in range(MAX_TRIES):
            row = MAKERS[task](rng, label, held_out)
            keys = tuple(sorted({text_key(text) for text in row.texts}))
            if len(keys) == len(row.texts) and keys not in seen and taken.isdisjoint(keys):
                break
        else:
            raise ValueError(f"only {len(rows)} of {size} {task} rows: add words or templates")
        seen.add(keys)
        rows.append(row)
    return rows


# ---------------------------------------------------------------- files


def course_quotes(rng: Random, text: str) -> str:
    """Most of the course's questions with quotation marks went through a csv writer twice."""
    if '"' not in text or rng.random() < 0.25:
        return text
    return '"' + text.replace('"', '""') + '"'


def cut_row(row: Row, split: str) -> Row:
    """A row that was cut at a line break and lost its label, as one in each of the course's files."""
    text, text2 = row.texts
    return Row((text, f'"{text2}') if split == "dev" else (f'"{text}', ""), "")


def csv_bytes(task: str, split: str, indices: list[int], rows: list[Row]) -> bytes:
    """The course's format: tab-separated, an unnamed index first, no label in test files."""
    names = {
        "sst": ["sentence", "sentiment"],
        "quora": ["sentence1", "sentence2", "is_duplicate"],
        "sts": ["sentence1", "sentence2", "similarity"],
    }[task]
    table = [["", "id", *names]]
    for index, row in zip(indices, rows, strict=True):
        row_id = hashlib.sha256("\t".join((split, *row.texts)).encode()).hexdigest()[:25]
        table.append([index, row_id, *row.texts, row.label])
    if split == "test-student":
        table = [cells[:-1] for cells in table]
        if task == "sst":  # here the course has one more column, and its header is "0"
            table = [["0", *table[0]]] + [[i + 1, float(i), *row[1:]] for i, row in enumerate(table[1:])]
    buffer = io.StringIO()
    csv.writer(buffer, delimiter="\t", lineterminator="\n").writerows(table)
    return buffer.getvalue().encode()


def make_files(seed: int) -> dict[str, bytes]:
    """The content of every sample file by its name; the same seed gives the same bytes."""
    files = {}
    for task, sizes in SIZES.items():
        rng = Random(f"{seed} {task}")  # one for each task: a change to one leaves the others alone
        indices = rng.sample(range(MAX_INDEX[task]), sum(sizes)) if task in MAX_INDEX else []
        taken = set()
        for split, size in zip(SPLITS, sizes, strict=True):
            rows = make_rows(rng, task, size, split != "train", taken)
            taken |= {text_key(text) for row in rows for text in row.texts}
            if task == "quora":
                rows = [Row(tuple(course_quotes(rng, text) for text in row.texts), row.label) for row in rows]
                if split != "test-student":
                    cut = rng.randrange(size)
                    rows[cut] = cut_row(rows[cut], split)
            row_indices = [indices.pop() for _ in rows] if indices else range(size)
            name = f"ids-sst-{split}.csv" if task == "sst" else f"{task}-{split}.csv"
            files[name] = csv_bytes(task, split, row_indices, rows)
    return files


def write_tree(words: list[str], label: str) -> str:
    """A tree in SST's form: each word a neutral leaf, each node with the words up to the end, the label on the root."""
    tree = f"({label if len(words) == 1 else 2} {words[-1]})"
    for place in range(len(words) - 2, -1, -1):
        node_label = label if place == 0 or label in "04" else "2"
        tree = f"({node_label} (2 {words[place]}) {tree})"
    return tree


def make_extra_files(seed: int, files: dict[str, bytes]) -> dict[str, bytes]:
    """Files of some additional sources (`config.EXTRA_SOURCES`), each with its publisher's quirks.

    Args:
        files: what `make_files` made; no row is repeated, but the trees are those of its SST training sentences.
    """
    stems = {"sst": "ids-sst", "quora": "quora", "sts": "sts"}
    taken = {task: set() for task in stems}
    for task, stem in stems.items():
        for split in SPLITS:
            for row in csv.DictReader(io.StringIO(files[f"{stem}-{split}.csv"].decode()), delimiter="\t"):
                taken[task] |= {text_key(row[name]) for name in row if name and name.startswith("sentence")}

    def rows(name, task, size=EXTRA_SIZE):
        return enumerate(make_rows(Random(f"{seed} {name}"), task, size, False, taken[task]), start=1)

    def pairs(name):
        return [(number, *row.texts, row.label[0]) for number, row in rows(name, "quora")]

    def join(lines, end="\n"):
        return "".join("\t".join(map(str, line)) + end for line in lines).encode()

    scaled = [(number, *row.texts, 1 + 0.8 * float(row.label)) for number, row in rows("sick", "sts")]
    sick = [f"{number}\t{a}\t{b}\t{score:.2f}".split("\t") for number, a, b, score in scaled]
    extra = {
        "sick/SICK.txt": join([("pair_ID", "sentence_A", "sentence_B", "relatedness_score"), *sick], "\r\n")
    }
    header = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    for split in ("train", "test"):
        mrpc = [(label, 2 * number, 2 * number + 1, a, b) for number, a, b, label in pairs(f"mrpc {split}")]
        extra[f"mrpc/msr_paraphrase_{split}.txt"] = "\ufeff".encode() + join([header, *mrpc])
    for split in ("dev", "test"):
        extra[f"paws_wiki/{split}.tsv"] = join(pairs(f"paws_wiki {split}"), "\r\n")
    literals = [
        (number, repr(a.encode()), repr(b.encode()), label) for number, a, b, label in pairs("paws_qqp")
    ]
    extra["paws_qqp/dev_and_test.tsv"] = join([("id", "sentence1", "sentence2", "label"), *literals])
    reviews = [row for _, row in rows("rotten_tomatoes", "sst")]
    extra["rotten_tomatoes_5class/rotten15k.csv"] = csv_bytes("sst", "extra", range(EXTRA_SIZE), reviews)
    train = csv.DictReader(io.StringIO(files["ids-sst-train.csv"].decode()), delimiter="\t")
    trees = [
        write_tree(row["sentence"].split(), row["sentiment"])
        for _, row in zip(range(EXTRA_SIZE), train, strict=False)
    ]
    extra["sst_trees/train.txt"] = join([tree] for tree in trees)
    return {f"extra/{name}": content for name, content in extra.items()}


def write_file(path: Path, content: bytes) -> None:
    """Write beside and rename, so that nobody reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the sample data files.", allow_abbrev=False)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path(__file__).resolve().parent / "sample",
        help="folder of the files (default: sample/ beside this script)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default: %(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a file on disk differs"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    try:
        files = make_files(args.seed)
        files |= make_extra_files(args.seed, files)
        files = {args.output_dir / name: content for name, content in files.items()}
        if args.check:
            differing = [p for p, content in files.items() if not p.is_file() or p.read_bytes() != content]
            for path in differing:
                print(f"{path}: differs from what seed {args.seed} makes")
            return 1 if differing else 0
        for path, content in files.items():
            write_file(path, content)
    except (OSError, ValueError) as error:
        print(f"make_sample.py: error: {error}", file=sys.stderr)
        return 2
    num_bytes = sum(len(content) for content in files.values())
    print(f"{args.output_dir}: wrote {len(files)} files, {num_bytes / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
