"""The leaderboard: every run of a results folder as a static site and as results/LEADERBOARD.md.

collect.py    finds run folders, and reads those that are new
summary.py    what a run contributes to the tables: its scores, how they were asked, and why it may not be ranked
flips.py      questions that changed between BF16 and a variant: counts and digests
details.py    what the page of a run shows beside its summary
ranking.py    who may be ranked against whom, intervals, ranks
findings.py   the page of findings
reading.py    JSON lines, many at once
index.py      what is remembered between two builds
site.py       the files of the site
markdown.py   LEADERBOARD.md
build.py      the verb

No text of a question, a target or an answer enters any of them.
"""
