# make demo   the whole line on a shipped recording, in a virtual environment of its own
# make test   every test, with all that it needs
# make lint   ruff and mypy
PYTHON ?= python3
VENV ?= .venv
# TORCH= leaves training, and its tests, out. EDGE_INSPECTOR_NVIDIA=1 fetches and builds NVIDIA's parts, so that no test of
# them is left out.
TORCH ?= torch==2.13.0
# ARGS: for pytest.
ARGS ?=
BIN = $(VENV)/bin
GST = /usr/bin/python3 -c 'import gi; gi.require_version("GstRtspServer", "1.0"); from gi.repository import GstRtspServer'
APT = command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]

.PHONY: demo test lint parts
demo: $(VENV)/.demo
	$(BIN)/edge-inspector demo

test: $(VENV)/.test $(if $(EDGE_INSPECTOR_NVIDIA),$(VENV)/.nvidia) parts
	$(BIN)/python -m pytest $(ARGS)

# What tests need of the system.
parts:
	@command -v mosquitto >/dev/null || [ -x /usr/sbin/mosquitto ] || { $(APT) && apt-get update -qq && \
	  apt-get install -y -qq mosquitto openssl >/dev/null; } || \
	  echo "left out: tests with a real broker (apt install mosquitto openssl)"
	@command -v systemd-nspawn >/dev/null || { $(APT) && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends systemd systemd-container dbus >/dev/null; } || \
	  echo "left out: the service under a real systemd (apt install systemd-container dbus)"
	@$(BIN)/python -c 'import ctypes; ctypes.CDLL("libaravis-0.8.so.0")' 2>/dev/null || { $(APT) && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends libaravis-0.8-0 >/dev/null; } || \
	  echo "left out: GigE Vision cameras (apt install libaravis-0.8-0)"
	@$(GST) 2>/dev/null || { $(APT) && apt-get update -qq && apt-get install -y -qq --no-install-recommends \
	  python3-gi gir1.2-gst-rtsp-server-1.0 gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good \
	  gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly >/dev/null && $(GST); } || \
	  echo "left out: RTSP and GStreamer cameras (apt install python3-gi gir1.2-gst-rtsp-server-1.0 and GStreamer's plugins)"
	@command -v fiu-run >/dev/null || { $(APT) && apt-get update -qq && apt-get install -y -qq fiu-utils >/dev/null; } || \
	  echo "left out: a failing disk (apt install fiu-utils)"
	@ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1 || { $(APT) && apt-get update -qq && \
	  apt-get install -y -qq libfaketime >/dev/null; } || echo "left out: clocks that jump (apt install libfaketime)"
	@command -v cc >/dev/null && command -v ip >/dev/null || { $(APT) && apt-get install -y -qq gcc libc6-dev iproute2 >/dev/null; } || \
	  echo "left out: V4L2 cameras and GPIO and cameras in networks of their own (apt install gcc libc6-dev iproute2)"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install -q -e ".[demo]"
	@# opencv-python needs libGL, which a bare server lacks.
	@$(BIN)/python -c 'import cv2' 2>/dev/null || { $(APT) && apt-get update -qq && \
	  apt-get install -y -qq libgl1 libglib2.0-0 >/dev/null && $(BIN)/python -c 'import cv2'; } || { \
	  echo "OpenCV's windows need libGL, which is not here: taking the headless variant"; \
	  $(BIN)/pip uninstall -q -y opencv-python && $(BIN)/pip install -q opencv-python-headless; }
	@touch $@

$(VENV)/.nvidia: tests/nvidia/install.sh | $(VENV)/.test
	tests/nvidia/install.sh $(BIN)/python
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@[ -z "$(TORCH)" ] || $(BIN)/pip install -q $(TORCH) -e ".[train]"
	$(BIN)/pip install -q onnx -e ".[test,pylon,gentl,gpiod]"
	@touch $@
