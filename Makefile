# make run | models | ablate | serve | index | test | lab | setup | lock | clean | clean-data; `make` alone says what each does. Variables are given on the command line
# (make run LANGS=da); none is taken from the environment, and LANG and LANGUAGE stay what they are: the locale.
LANGS    = no sv da
PROFILE  = mini
STAGES   =
AUDIO    =
CORPUS   =
JOBS     =
SEEDS    =
SET      =
FORCE    =
EXTRAS   =
LAB      =
ALL      =
HOST     = 127.0.0.1
PORT     = 8000
ADAPTERS =
PYTHON  ?= python3.11

# An activated conda environment (not its base) is used as it is; otherwise .venv is made here.
ifneq ($(filter-out base,$(CONDA_DEFAULT_ENV)),)
ENV   := $(CONDA_PREFIX)
BASE  := $(ENV)/bin/python
BUILD := true
UV    := uv
else
ENV   := .venv
BASE   = $(PYTHON)
BUILD  = $(PYTHON) -m venv $(ENV) && $(PY) -m pip install --quiet uv
UV    := $(ENV)/bin/uv
endif
PY    := $(ENV)/bin/python
STAMP := $(ENV)/.csm-nb-setup
# What each target takes; anything else on the command line is a mistake (LANG=da would run three languages).
TAKES_help   := LANGS PROFILE STAGES AUDIO CORPUS JOBS SET FORCE EXTRAS LAB
TAKES_run    := LANGS PROFILE STAGES AUDIO CORPUS JOBS SET FORCE
TAKES_models := LANGS PROFILE STAGES
TAKES_ablate := LANGS PROFILE CORPUS JOBS SEEDS SET
TAKES_serve  := PROFILE HOST PORT ADAPTERS
TAKES_lab    := LAB LANGS PROFILE
TAKES_setup  := EXTRAS
TAKES_clean-data := ALL
ALWAYS       := PYTHON CONDA_DEFAULT_ENV CONDA_PREFIX SHELL MAKE MAKEFLAGS MFLAGS MAKEFILES
GOALS   := $(or $(MAKECMDGOALS),help)
TAKEN   := $(sort $(foreach goal,$(GOALS),$(TAKES_$(goal))))
GIVEN   := $(sort $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name))))
UNKNOWN := $(filter-out $(TAKEN) $(ALWAYS),$(GIVEN))
ifneq ($(UNKNOWN),)
NEAREST := $(shell $(firstword $(wildcard $(PY)) $(BASE)) -c 'import difflib, sys; name, *known = sys.argv[1:]; \
  name = name.upper(); near = [k for k in known if k.startswith(name[:3])] or difflib.get_close_matches(name, known, 1, 0.6); \
  print("; did you mean " + near[0] + "?" if near else ".")' '$(firstword $(UNKNOWN))' $(TAKEN) 2>/dev/null)
$(error make $(GOALS) takes no $(firstword $(UNKNOWN))$(or $(NEAREST),.) It takes $(or $(TAKEN),nothing) (and PYTHON))
endif
quote = '$(subst ','\'',$(1))'
each = $(foreach word,$(1),$(call quote,$(word)))

# uv does not read pip's settings: where pip is told of a mirror, uv is told too
INSTALL = index=$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(PY) -m pip config get global.index-url 2>/dev/null)}}; \
  [ -z "$$index" ] || export UV_DEFAULT_INDEX="$$index"; $(UV) pip install --python $(PY)

.PHONY: help run models ablate serve index test lab setup lock clean clean-data
help:
	@echo "make run     run the notebooks; LANGS='$(LANGS)' PROFILE=$(PROFILE) STAGES=... AUDIO=... CORPUS=... JOBS=... SET='key=value ...' FORCE=1"
	@echo "make models  list the models that PROFILE needs for LANGS, with sizes and licences, and fetch what is missing from the hub"
	@echo "make ablate  the same with one thing changed at a time, at equal compute; SEEDS='0 1 2', LANGS PROFILE CORPUS JOBS SET as above"
	@echo "make serve   speak by HTTP what PROFILE's base and adapters can; HOST=$(HOST) PORT=$(PORT) ADAPTERS=folder"
	@echo "make index   write runs/index.html anew, with pages of the runs that papermill alone made"
	@echo "make test    run every test"
	@echo "make lab     begin in JupyterLab: the notebooks with the values of LANGS and PROFILE in them, and where to begin; LAB='--no-browser ...'"
	@echo "make setup   install what requirements.lock pins, into the activated conda environment or .venv; EXTRAS=gpu,serve,filters adds"
	@echo "make lock    resolve pyproject.toml anew into requirements.lock"
	@echo "make clean   remove caches; .venv and everything that runs made stay"
	@echo "make clean-data  list tokens, trainings, speech, streams and clips that are kept below data/, and remove what no run uses, after a question; ALL=1: all"

run: $(STAMP)
	@$(PY) -m csm_nb.runs --langs $(call each,$(LANGS)) --profile $(call quote,$(PROFILE)) $(if $(STAGES),--stages $(call each,$(STAGES))) \
	  $(if $(AUDIO),--audio $(call quote,$(AUDIO))) $(if $(CORPUS),--corpus $(call quote,$(CORPUS))) \
	  $(if $(JOBS),--jobs $(call each,$(JOBS))) $(if $(SET),--set $(call quote,$(SET))) $(if $(filter-out 0 no false,$(FORCE)),--force)

models: $(STAMP)
	@$(PY) -m csm_nb.runs.models --langs $(call each,$(LANGS)) --profile $(call quote,$(PROFILE)) $(if $(STAGES),--stages $(call each,$(STAGES))) --fetch

ablate: $(STAMP)
	@$(PY) -m csm_nb.ablate --langs $(call each,$(LANGS)) --profile $(call quote,$(PROFILE)) \
	  $(if $(SEEDS),--seeds $(call each,$(SEEDS))) $(if $(CORPUS),--corpus $(call quote,$(CORPUS))) \
	  $(if $(JOBS),--jobs $(call each,$(JOBS))) $(if $(SET),--set $(call quote,$(SET)))

serve: $(STAMP)
	@$(PY) -c 'import fastapi, prometheus_client, uvicorn' 2>/dev/null || { \
	  echo "make: fastapi and uvicorn are missing; installing them (make setup EXTRAS=serve)"; \
	  $(INSTALL) -e '.[serve]' -c requirements.lock; }
	@$(PY) -m csm_nb.serve --profile $(call quote,$(PROFILE)) --host $(call quote,$(HOST)) --port $(call quote,$(PORT)) \
	  $(if $(ADAPTERS),--adapters $(call quote,$(ADAPTERS)))

test: $(STAMP)
	$(PY) -m pytest

index: $(STAMP)
	@$(PY) -m csm_nb.runs.pages

clean-data: $(STAMP)
	@$(PY) -m csm_nb.runs.kept --clean $(if $(filter-out 0 no false,$(ALL)),--all)

lab: $(STAMP)
	@$(PY) -m csm_nb.runs.lab --langs $(call each,$(LANGS)) --profile $(call quote,$(PROFILE))
	JUPYTER_CONFIG_PATH='$(CURDIR)/csm_nb/runs/templates/jupyter'"$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
	  $(ENV)/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir=. \
	  --LabApp.default_url=/lab/tree/runs/lab/$(basename $(notdir $(PROFILE)))/START.md $(LAB)

setup: $(STAMP)
ifneq ($(EXTRAS),)
	@$(INSTALL) -e '.[$(EXTRAS)]' -c requirements.lock
endif

$(STAMP): requirements.lock pyproject.toml
	@$(BASE) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null || { \
	  echo "make: $(BASE) is missing or not Python 3.11 or 3.12. Install Python 3.11 (with venv), or say where it is:"; \
	  echo "  make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; \
	  echo "or use conda: conda env create -f environment.yml && conda activate csm-nb"; exit 1; }
	$(BUILD)
	@$(INSTALL) --compile-bytecode --no-deps -r requirements.lock
	@$(INSTALL) --no-deps -e .
	@touch $@

lock:
	$(UV) pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-annotate --no-header -o requirements.lock

clean:
	rm -rf .pytest_cache .ruff_cache *.egg-info; find csm_nb tests -name __pycache__ -prune -exec rm -rf {} +
