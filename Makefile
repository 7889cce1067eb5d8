# make report   run the notebooks, then write report.html and report.pdf   [PROFILE=quick|shipped|full] [ARGS="--only 04"]
# make test     run the tests                                               [ARGS="-k schedules"]
# make bench    how fast everything is, compared with the reports' way: about ten minutes   [ARGS="--only data"]
# make experiments   the trainings that notebook 06 compares: hours on a CPU; continues where it was stopped
# make submission STUDENT_ID=... NAME=...   the course's zip, with the report made last   [ARGS="--layout earlier"]
# make lab      JupyterLab on the notebooks
# make lock     write requirements.txt from pyproject.toml                  [ARGS=--upgrade]
# make clean    remove what can be made again quickly (keeps data/ and figures/)
#
# Each sets up .venv first if needed. To use another interpreter: make PYTHON=python3.12 report
PYTHON ?= python3
PROFILE ?= auto
BIN := .venv/bin
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable microsoft-edge
APT := apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends
# The browser is installed while the packages are; several goals wait for each other.
ifeq ($(words $(MAKECMDGOALS)),1)
MAKEFLAGS += --jobs=2
endif
CAN_APT = [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null

help:
	@sed -n 's/^# \(make\)/\1/p' Makefile

report: .venv/installed browser
	$(BIN)/python run_notebooks.py --profile $(PROFILE) $(ARGS)

test: .venv/installed browser
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Train a small network twice with each choice and sample in 10 steps (steps=0: all T); then 06 compares.
EXPERIMENT := $(BIN)/python run_notebooks.py --profile shipped --only 06 -p preset=tokens -p max_images=0 \
  -p epochs=2 -p batch_size=32 -p steps=10 --sweep seed=0,1
SMALL := channels=[32,48,64]
# A small layout, for 8,192 images, with one part of its recipe changed.
RECIPE := $(BIN)/python run_notebooks.py --profile shipped --only 06 -p preset=layout -p max_images=8192 -p epochs=1 \
  -p batch_size=32 -p learning_rate=4e-3 -p seeds=2 --sweep

experiments: .venv/installed
	$(EXPERIMENT) $(SMALL)
	$(EXPERIMENT) $(SMALL) schedule=linear num_train_timesteps=100,300,500,1000
	$(EXPERIMENT) $(SMALL) schedule=linear-rescaled num_train_timesteps=100,300,500
	$(EXPERIMENT) $(SMALL) steps=0 seeds=1 schedule=linear num_train_timesteps=100,300,500,1000
	$(EXPERIMENT) $(SMALL) steps=0 seeds=1 schedule=linear-rescaled num_train_timesteps=100,300,500
	$(EXPERIMENT) $(SMALL) schedule=sigmoid,shifted-cosine
	$(EXPERIMENT) $(SMALL) zero_snr=true
	$(EXPERIMENT) $(SMALL) prediction=v_prediction,epsilon
	$(EXPERIMENT) $(SMALL) loss_weighting=min-snr
	$(EXPERIMENT) $(SMALL) 'attention=["none","none","none"]'
	$(EXPERIMENT) $(SMALL) epochs=4 conditioning=tokens,multi-hot
	$(EXPERIMENT) $(SMALL) epochs=4 conditioning=linear 'attention=["none","none","none"]'
	$(EXPERIMENT) $(SMALL) epochs=8 leave_out=unseen,random
	$(EXPERIMENT) $(SMALL) ema_decay=0
	$(EXPERIMENT) $(SMALL) flip=true
	$(EXPERIMENT) $(SMALL) scale_shift=false
	$(EXPERIMENT) $(SMALL) label_dropout=0
	$(EXPERIMENT) $(SMALL) guidance=none
	$(EXPERIMENT) channels=[16,24,32] norm_groups=8
	$(EXPERIMENT) channels=[48,64,96]
	$(RECIPE) optimizer=muon,adamw
	$(RECIPE) optimizer=muon conditioning=tokens
	$(RECIPE) optimizer=muon loss_weighting=none
	$(RECIPE) optimizer=muon object_shares=[]
	$(BIN)/python run_notebooks.py --profile shipped --only 06 -p preset=linear-512 -p channels=[32,32,64,64] \
	  -p epochs=1 -p max_images=12288 -p learning_rate=8e-4 -p sampler=ddim -p steps=50 -p seeds=4
	$(BIN)/python run_notebooks.py --profile shipped --only 06 -p score=false \
	  --sweep preset=layout,latent,few-step,mlp-fusion,linear-attn,cross-attention,linear-512,linear-512-six
	$(BIN)/python run_notebooks.py --profile shipped --only 06

bench: .venv/installed
	$(BIN)/python benchmarks/speed.py $(ARGS)

submission: .venv/installed browser
	LAB6_STUDENT_ID="$(STUDENT_ID)" LAB6_STUDENT_NAME="$(NAME)" \
	  $(BIN)/python run_notebooks.py --profile $(PROFILE) --submission $(ARGS)

lab: .venv/installed
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks \
	  $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

lock: $(BIN)/uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --no-emit-index-url pyproject.toml --extra test \
	  -o requirements.txt $(ARGS) >/dev/null

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache figures/quick data/runs/tiny data/runs/notebooks/tiny
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/installed: requirements.txt | $(BIN)/uv
	$(BIN)/uv pip install -q --python $(BIN)/python -r requirements.txt
	@# Import once with bytecode allowed: it saves every kernel seconds, even if bytecode is switched off later.
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "import lab6_utils, run_notebooks, accelerate, ipykernel_launcher, \
	  ipywidgets, matplotlib.pyplot, torchvision, torch.utils.tensorboard, diffusers.training_utils"
	@touch $@

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; say: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || \
	  { pkg=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	    { $(CAN_APT) && $(APT) $$pkg; } >/dev/null 2>&1 && $(PYTHON) -m venv --clear .venv || \
	    { echo "$(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: apt install $$pkg"; exit 1; }; }
	$(BIN)/python -m pip install -q --disable-pip-version-check uv

# A browser prints the PDF. Without one the report is only HTML, and run_notebooks.py says so.
browser: | $(BIN)/uv
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit 0; done; \
	$(CAN_APT) && echo "installing chromium" && \
	  { $(APT) chromium fonts-noto-cjk fonts-liberation fonts-dejavu-extra; } >/dev/null 2>&1 || true

.PHONY: help report experiments bench submission test lab lock clean browser
