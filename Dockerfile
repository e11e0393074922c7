# syntax=docker/dockerfile:1
FROM python:3.13-slim
WORKDIR /app
COPY requirements.txt .
# What only tests need stays out; django-htmx comes without Django, which nothing imports. Pip's cache is a mount and
# never in the image.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/pip export PIP_CACHE_DIR=/pip \
    && grep -vE '# test:|^django-htmx' requirements.txt > /tmp/run.txt \
    && pip install --root-user-action=ignore -r /tmp/run.txt \
    && pip install --root-user-action=ignore --no-deps "$(grep -oE '^django-htmx==[0-9.]+' requirements.txt)" \
    && useradd --uid 1000 --no-create-home parley \
    && install -d -m 700 -o parley /data
COPY main.py .
# Others can reach HOST, so it starts only with APP_PASSWORD or APP_PASSWORD_HASH.
ENV HOST=0.0.0.0 PORT=8080 DATABASE_URL=sqlite:////data/parley.db PYTHONDONTWRITEBYTECODE=1
USER 1000
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=8s --start-period=20s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/healthz', timeout=7)"]
CMD ["python", "main.py"]
