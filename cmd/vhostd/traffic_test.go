package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

const frames = 100

// busyGuest sends frames through a vhostd and waits until they are counted.
func busyGuest(t *testing.T, path string) {
	t.Helper()
	g := vhosttest.Start(t, nil, vhosttest.Options{Path: path})
	frame := make([]byte, 64)
	for range frames {
		if err := g.Send(0, virtio.NetHdr{}, frame, nil); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all frames are counted", func() bool { return statsOf(t, path).Queues[1].Frames == frames })
}

func statsOf(t *testing.T, path string) report {
	t.Helper()
	got := command(t, "stats", "--socket-path", path, "--json")
	if got.code != 0 {
		t.Fatalf("vhostd stats: %+v", got)
	}
	var r report
	if err := json.Unmarshal([]byte(got.stdout), &r); err != nil {
		t.Fatalf("%v:\n%s", err, got.stdout)
	}
	return r
}

func TestStats(t *testing.T) {
	path := socketIn(t)
	p := start(t, "--socket-path", path, "--net", "null")
	before := statsOf(t, path)
	if before.Connected || len(before.Queues) != 2 || before.Daemon.PID != p.cmd.Process.Pid || before.Daemon.Net != "null" {
		t.Errorf("before a front-end came: %+v", before)
	}
	busyGuest(t, path)
	r := statsOf(t, path)
	q := r.Queues[1]
	if !r.Connected || r.Sessions != 1 || !slices.Contains(r.Features, "VERSION_1") || r.MemoryRegions != 2 ||
		q.Direction != fromGuest || !q.Started || !q.Enabled || q.Bytes != frames*64 || q.Outcomes["copied"] != frames {
		t.Errorf("with a guest: %+v", r)
	}
	table := command(t, "stats", "--control", path+controlSuffix)
	for _, want := range []string{
		`connected, [0-9.]+MiB of guest memory in 2 regions`,
		`VERSION_1`,
		fmt.Sprintf(`(?m)^ +1 +FromGuest +256 +running +%d +6\.2KiB +- +- `, frames),
		fmt.Sprintf(`(?m)^ +1 +0 +%d +0`, frames), // zero-copied, copied
	} {
		if !regexp.MustCompile(want).MatchString(table.stdout) {
			t.Errorf("no %q in:\n%s%s", want, table.stdout, table.stderr)
		}
	}
}

// TestStatsWatchSlowly: a daemon hangs up on who says nothing for a minute, and so may come before the next look.
func TestStatsWatchSlowly(t *testing.T) {
	path := socketIn(t)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, stop := context.WithCancel(t.Context())
	go func() {
		defer stop()
		for range 3 {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = bufio.NewReader(c).ReadString('\n')
			fmt.Fprintln(c, `{"version":1,"result":{}}`)
			c.Close()
		}
	}()
	if err := (statsFlags{watch: true, json: true, interval: 10 * time.Millisecond}).show(ctx, path, io.Discard); err != nil {
		t.Error(err)
	}
}

// TestStatsOfPortOfRun: options of the other kind of daemon are refused in words of people.
func TestStatsOfPortOfRun(t *testing.T) {
	path := socketIn(t)
	start(t, "--socket-path", path, "--net", "null")
	if got := command(t, "stats", "--socket-path", path, "--port", "vm1"); got.code != exitFailure || !strings.Contains(got.stderr, "a vhostd run has one port") {
		t.Errorf("%+v", got)
	}
}

// TestStatsWatch reads a few of the looks that --watch takes, and interrupts it.
func TestStatsWatch(t *testing.T) {
	path := socketIn(t)
	start(t, "--socket-path", path, "--net", "null")
	busyGuest(t, path)
	for _, asJSON := range []bool{false, true} {
		cmd := exec.Command(binary, "stats", "--socket-path", path, "--watch", "--interval", "10ms", fmt.Sprintf("--json=%v", asJSON))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		looks, rated := 0, false
		for lines := bufio.NewScanner(out); looks < 3 && lines.Scan(); {
			var r report
			switch line := lines.Text(); {
			case asJSON && json.Unmarshal([]byte(line), &r) == nil && r.Queues[1].Frames == frames, strings.HasPrefix(line, "vhostd "):
				looks++
			case regexp.MustCompile(`FromGuest +256 +running +100 +6\.2KiB +0 +0 `).MatchString(line):
				rated = true
			}
		}
		_ = cmd.Process.Signal(syscall.SIGINT)
		_, _ = io.Copy(io.Discard, out)
		if err := cmd.Wait(); err != nil || looks != 3 || rated == asJSON {
			t.Errorf("json %v: %v, %d looks, rates %v", asJSON, err, looks, rated)
		}
	}
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

// metricsURL finds where a vhostd serves its metrics in its log.
func metricsURL(t *testing.T, p *process) string {
	t.Helper()
	p.waitLog("serving metrics")
	m := regexp.MustCompile(`url=(http://[^ ]*)/metrics`).FindStringSubmatch(p.stderr.String())
	if m == nil {
		t.Fatal("no URL in the log")
	}
	return m[1]
}

func TestMetrics(t *testing.T) {
	path := socketIn(t)
	p := start(t, "--socket-path", path, "--net", "null", "--metrics", "127.0.0.1:0")
	busyGuest(t, path)
	url := metricsURL(t, p)
	code, text := get(t, url+"/metrics")
	if code != http.StatusOK {
		t.Fatalf("status %d: %s", code, text)
	}
	for _, want := range []string{
		`vhostd_info{device="null",name="",socket="` + path + `",version="`,
		`vhostd_front_end_connected 1`,
		`vhostd_sessions_total 1`,
		`vhostd_queue_frames_total{direction="FromGuest",queue="1"} 100`,
		`vhostd_queue_bytes_total{direction="FromGuest",queue="1"} 6400`,
		`vhostd_queue_outcomes_total{direction="FromGuest",outcome="copied",queue="1"} 100`,
		`vhostd_queue_outcomes_total{direction="FromGuest",outcome="zerocopied",queue="1"} 0`,
		`vhostd_queue_started{direction="ToGuest",queue="0"} 1`,
		`vhostd_queue_head_wait_seconds_max{`,
		`process_open_fds `,
	} {
		if !strings.Contains(text, "\n"+want) {
			t.Errorf("no %s in the metrics", want)
		}
	}
	if code, _ := get(t, url+"/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("profiles without --pprof: status %d", code)
	}
	if t.Failed() {
		t.Log(text)
	}
}

// TestMetricsCrowded: those who connect and say nothing take few descriptors, and hold up whoever asks for some seconds.
func TestMetricsCrowded(t *testing.T) {
	p := start(t, "--socket-path", socketIn(t), "--net", "null", "--metrics", "127.0.0.1:0")
	url := metricsURL(t, p)
	const crowd = maxScrapers + 30
	for range crowd {
		c, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	time.Sleep(100 * time.Millisecond)
	if n := len(descriptors(t, p.cmd.Process.Pid)); n > maxScrapers+20 {
		t.Errorf("%d descriptors, with %d connections", n, crowd)
	}
	for since := time.Now(); ; {
		if r, err := http.Get(url + "/metrics"); err == nil {
			r.Body.Close()
			return
		}
		if time.Since(since) > patience {
			t.Fatal("no metrics")
		}
	}
}

// TestMetricsByTCP: Landlock has no say in what an MPTCP socket connects to.
func TestMetricsByTCP(t *testing.T) {
	l, err := listenTCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.Control(func(fd uintptr) {
		if p, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PROTOCOL); p != unix.IPPROTO_TCP {
			t.Errorf("protocol %d (%v), want TCP", p, err)
		}
	}); err != nil {
		t.Error(err)
	}
}

func TestProfiles(t *testing.T) {
	p := start(t, "--socket-path", socketIn(t), "--net", "null", "--metrics", "127.0.0.1:0", "--pprof")
	code, text := get(t, metricsURL(t, p)+"/debug/pprof/goroutine?debug=1")
	if code != http.StatusOK || !strings.Contains(text, "main.serve") {
		t.Errorf("status %d:\n%s", code, text)
	}
}

// TestUserNetworkRuns: the default network opens without privilege or options, and its forwards are told.
func TestUserNetworkRuns(t *testing.T) {
	path := socketIn(t)
	p := start(t, "--socket-path", path, "--hostfwd", "tcp:127.0.0.1:0-:22")
	r := statsOf(t, path)
	if r.Device.Kind != "user" || r.User == nil || len(r.User.Forwards) != 1 || len(r.Queues) != 2 {
		t.Fatalf("%+v", r)
	}
	f := r.User.Forwards[0]
	if f.Proto != "tcp" || !strings.HasPrefix(f.Host, "127.0.0.1:") || strings.HasSuffix(f.Host, ":0") || f.Guest != "10.0.2.15:22" {
		t.Errorf("forward %+v", f)
	}
	if table := command(t, "stats", "--socket-path", path); !strings.Contains(table.stdout, "tcp "+f.Host+" to 10.0.2.15:22") {
		t.Errorf("the forward is not in:\n%s", table.stdout)
	}
	if code := p.end(syscall.SIGTERM); code != exitOK {
		t.Errorf("exit code %d", code)
	}
}

// TestOutcomes: what people are shown are all the outcomes that there are.
func TestOutcomes(t *testing.T) {
	var all []string
	for o := range zerocopy.NumOutcomes {
		all = append(all, o.String())
	}
	if got := slices.Sorted(slices.Values(outcomes)); !slices.Equal(got, slices.Sorted(slices.Values(all))) {
		t.Errorf("shown are %v, there are %v", got, all)
	}
}
