# vhostd is built and tested with Go alone; `make demo` and `make test` install what else they need (scripts/setup.sh).
#
#   make demo     boot a guest whose network is vhostd, and watch it
#   make build    bin/vhostd, one static binary
#   make test     everything that CI runs
#   make lint race vm bench    parts of it
#   make fuzz FUZZTIME=10m     each fuzzing target for that long, see docs/fuzzing.md; in CI it is 3 seconds
#   make soak                  an hour of guests that come and go over every network: nothing leaks, grows or gets lost; wants root
#   make bench-peers           vhostd beside DPDK, in turns, into docs/perf; takes half an hour, wants root and a quiet machine
#
# VHOSTD_REQUIRE=all (or vm,tap,...) turns tests that skip for want of something into failures, as in CI.

GO ?= go
export CGO_ENABLED = 0

# The packages without the virtual machines and the soak test: these take minutes and are run by themselves, so that they print as they go.
PACKAGES = $$($(GO) list ./... | grep -v -e '/test/vm$$' -e '/test/soak$$')
stage = @printf '\n== %s  %s\n' "$$(date +%T)"

.PHONY: all build demo test lint cross unit fuzz vm vm-packed race bench bench-once soak soak-short soak-order setup clean

all: build

build:
	$(GO) build -trimpath -ldflags '-s -w' -o bin/vhostd ./cmd/vhostd

demo:
	@scripts/setup.sh demo
	@$(MAKE) --no-print-directory build
	@$(GO) run ./test/vm/demo -vhostd bin/vhostd

setup:
	@scripts/setup.sh test

test: setup lint cross unit race bench-once fuzz soak-short vm
	$(stage) "all passed"

lint:
	$(stage) "gofmt, go vet, staticcheck"
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "gofmt -w is needed on:" $$unformatted; exit 1; }
	$(GO) vet ./...
	$(GO) tool -modfile=tools.mod staticcheck ./...

cross:
	$(stage) "static builds for amd64 and arm64"
	GOARCH=amd64 $(GO) build ./...
	GOARCH=arm64 $(GO) build ./...
	GOARCH=arm64 $(GO) vet ./...

unit:
	$(stage) "unit tests"
	$(GO) test -count=1 -timeout 5m $(PACKAGES)

# The race detector sees heap memory only: the fixtures then keep guest RAM there. It needs a C compiler.
race:
	$(stage) "tests under the race detector"
	CGO_ENABLED=1 $(GO) test -count=1 -race -short -timeout 8m $(PACKAGES)

FUZZTIME ?= 3s
fuzz:
	$(stage) "every fuzzing target for $(FUZZTIME)"
	@GO="$(GO)" scripts/fuzz.sh $(FUZZTIME)

bench-once:
	$(stage) "every benchmark once"
	$(GO) test -count=1 -timeout 5m -run '^$$' -bench . -benchtime 1x $(PACKAGES)

bench:
	$(GO) test -timeout 30m -run '^$$' -bench . -benchmem $(PACKAGES)

soak:
	$(stage) "guests come and go for $(SOAK)"
	$(GO) test -count=1 -v -timeout 0 ./test/soak -soak $(SOAK)

SOAK ?= 1h

soak-short:
	$(stage) "guests come and go for 100 s"
	$(GO) test -count=1 -timeout 6m ./test/soak -soak 100s

# Not in CI, which runs the same test with fewer frames.
soak-order:
	$(stage) "10 million frames over each of four kinds of ring, a million through the kernel, completed out of order"
	$(GO) test -count=1 -v -timeout 30m -run TestTenMillion ./backend -frames 10000000
	$(GO) test -count=1 -v -timeout 30m -run TestOrderThroughTheKernel ./netdev/udp -frames 1000000

# PEERS are options of test/perf, which do parts of it: -pairs, -seconds, -work, -ring, -guest, -limit.
bench-peers:
	@scripts/setup.sh bench
	@$(MAKE) --no-print-directory build
	$(GO) run ./test/perf -pairs 5 -date $$(date +%F) $(PEERS)

vm:
	$(stage) "tests with virtual machines"
	$(GO) test -count=1 -v -timeout 15m ./test/vm

# The same with packed rings in every guest.
vm-packed:
	$(stage) "tests with virtual machines, packed rings"
	VMTEST_PACKED=1 $(GO) test -count=1 -v -timeout 20m ./test/vm

clean:
	rm -rf bin .cache
