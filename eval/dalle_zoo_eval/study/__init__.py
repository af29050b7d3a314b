"""Human studies as in figure 7 of the paper: people compare the images of two or more systems.

```
folders or manifests ─► sources ─► design ─► make ─► FOLDER/page, FOLDER/study.json
raters ─► page ─► exported votes, or server ─► log ─► FOLDER/votes
FOLDER/study.json, votes ─► votes ─► analysis, strengths ─► results ─► report
```
"""
