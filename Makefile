# make demo     trains a small SiT on handwritten digits and draws some: see demo/index.html
# make app      opens a page to play with that model
# make ladder   trains the paper's design ladder in miniature, and writes docs/ladder.md
# make test     runs the tests
# Each makes .venv first; PYTHON and VENV choose another interpreter or place, DEMO and PRECISION another demo.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
PRECISION ?= fp32
DIGITS := --data-path builtin:digits --vae assets/digits-vae --image-size 32 --num-classes 10
GUIDANCE := --cfg-scale 2.75 --cfg-channels all
# Multi-process tests on few cores: threads that spin while they wait would slow each other tenfold.
QUIET := OMP_WAIT_POLICY=PASSIVE
# A process of tests for each core; those of a file stay together, with what they make once.
SHARED := -n auto --maxprocesses 8 --dist loadfile

.PHONY: install extra demo demo-train demo-samples app ladder test test-slow test-gpu test-slurm test-browser lint clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -r requirements.txt
	touch $@

# What the web page, the notebook and the tests in a browser need besides.
extra: $(VENV)/extra

$(VENV)/extra: requirements-extra.txt $(VENV)/installed
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -r requirements-extra.txt
	touch $@

demo: install demo-train demo-samples
	$(BIN)/python scripts/demo_report.py $(DEMO)

# 1,400 steps of a 1.9 M parameter model; the same command again starts a new run.
demo-train: install
	@echo
	@echo "1 of 3: training. A small SiT, of 1.9 million parameters, learns to turn noise into handwritten digits, from 5,000 of"
	@echo "MNIST's. It takes 1,400 steps of 128 digits each: four to seven minutes on two cores. \"Train Loss\" falls from about"
	@echo "1.9 to 1.2 and can come no lower than what noise leaves open; \"Time Left\" ends each line. Every 200 steps it draws"
	@echo "16 digits, for you to look at: $(DEMO)/results/000-*/samples/"
	@echo
	rm -rf $(DEMO)
	$(BIN)/python train.py $(DIGITS) --model SiT-T/2 --results-dir $(DEMO)/results --max-steps 1400 \
	  --global-batch-size 128 --lr 2e-3 --warmup-steps 100 --lr-schedule cosine --grad-clip 1 --ema-decay 0.998 \
	  --cfg-scale 2 --log-every 50 --sample-every 200 --num-workers 1 --precision $(PRECISION)

# Sample i is of class i mod 10, so 200 samples are 20 of each digit.
demo-samples: install
	@echo
	@echo "2 of 3: drawing 200 digits, 20 of each, by the ODE, which turns noise into a digit without further chance, and by the SDE,"
	@echo "which adds fresh noise on its way: about a minute. Then ten digits on their way from noise, as an animation."
	@echo
	@ckpt=$$(ls -v $(DEMO)/results/000-*/checkpoints/*.pt | tail -n 1); \
	run() { echo "python $$*"; $(BIN)/python "$$@"; }; \
	for mode in "ODE --sampling-method dopri5" "SDE --num-sampling-steps 60"; do \
	  run sample_ddp.py $$mode --ckpt $$ckpt $(GUIDANCE) --class-labels 0 1 2 3 4 5 6 7 8 9 \
	    --num-fid-samples 200 --per-proc-batch-size 100 --no-png --sample-dir $(DEMO)/samples \
	    --precision $(PRECISION) || exit 1; \
	done; \
	run sample.py ODE --ckpt $$ckpt $(GUIDANCE) --sampling-method heun --num-sampling-steps 40 --precision $(PRECISION) \
	  --out $(DEMO)/digits.png --trajectory $(DEMO)/trajectory.gif

# On the newest checkpoint; looked for first, since what the page needs takes a while to install.
app:
	@ls $(DEMO)/results/000-*/checkpoints/*.pt > /dev/null 2>&1 || \
	  { echo "make app: there is no model in $(DEMO)/results; run make demo first" >&2; exit 1; }
	@$(MAKE) --no-print-directory extra
	@exec $(BIN)/python app.py --ckpt "$$(ls -v $(DEMO)/results/000-*/checkpoints/*.pt | tail -n 1)"

# The paper's design ladder on the same digits; goes on where it was stopped.
ladder: install
	$(QUIET) $(BIN)/python experiments/ladder.py --page docs/ladder.md

test: install
	$(QUIET) $(BIN)/python -m pytest $(SHARED) -m "not slow and not slurm and not gpu and not browser"

test-slow: install
	$(QUIET) $(BIN)/python -m pytest -m alone
	$(QUIET) $(BIN)/python -m pytest $(SHARED) -m "slow and not alone"

# On the GPU where there is one; the other tests do not see it.
test-gpu: install
	$(QUIET) $(BIN)/python -m pytest -m gpu

# As one node on this machine, from Debian's packages; as root.
test-slurm: install
	command -v slurmctld slurmd munged > /dev/null || { apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	  slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge > /dev/null; }
	$(QUIET) $(BIN)/python -m pytest -m slurm

# In Debian's chromium; as root, if it has to be installed.
test-browser: extra
	command -v chromium > /dev/null || { apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null; }
	$(QUIET) $(BIN)/python -m pytest -m browser

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO)
