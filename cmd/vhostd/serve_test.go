package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/config"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
)

// many is a `vhostd serve` with its configuration.
type many struct {
	*process
	dir string // of the sockets and the file
}

// head is what the configurations of these tests begin with.
const head = "[control]\nsocket = \"DIR/ctl\"\n[defaults]\nsocket-path = \"DIR/{port}.sock\"\nnet = \"null,echo=on\"\n"

// serveMany starts a daemon with the ports that text lists.
func startMany(t *testing.T, text string) *many {
	t.Helper()
	m := &many{dir: vhosttest.ShortDir(t)}
	m.write(t, text)
	m.process = launch(t, exec.Command(binary, "serve", "--config", m.file()))
	return m
}

func (m *many) file() string              { return filepath.Join(m.dir, "vhostd.toml") }
func (m *many) socket(port string) string { return filepath.Join(m.dir, port+".sock") }

// write makes a new configuration, which nobody has read yet.
func (m *many) write(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(m.file(), []byte(strings.ReplaceAll(head+text, "DIR", m.dir)), 0o600); err != nil {
		t.Fatal(err)
	}
}

// reload has the daemon read its configuration, and returns what it says.
func (m *many) reload(t *testing.T, args ...string) (reloadReport, result) {
	t.Helper()
	got := command(t, append([]string{"reload", "--config", m.file(), "--json"}, args...)...)
	var r reloadReport
	if got.stdout != "" {
		if err := json.Unmarshal([]byte(got.stdout), &r); err != nil {
			t.Fatalf("%v in %+v", err, got)
		}
	}
	return r, got
}

// change reloads a new configuration, which has to work.
func (m *many) change(t *testing.T, text string) reloadReport {
	t.Helper()
	m.write(t, text)
	r, got := m.reload(t)
	if got.code != exitOK {
		t.Fatalf("reload: %+v", got)
	}
	return r
}

func (m *many) stats(t *testing.T) map[string]portReport {
	t.Helper()
	got := command(t, "stats", "--control", filepath.Join(m.dir, "ctl"), "--json")
	var r fleetReport
	if err := json.Unmarshal([]byte(got.stdout), &r); err != nil {
		t.Fatalf("%v in %+v", err, got)
	}
	ports := map[string]portReport{}
	for _, p := range r.Ports {
		ports[p.Name] = p
	}
	return ports
}

// echoes is a guest at a port that returns its frames, who counts them.
type echoes struct {
	t    *testing.T
	g    *vhosttest.Guest
	seq  uint64
	stop chan struct{}
	done chan struct{}
}

func newEchoes(t *testing.T, path string) *echoes {
	t.Helper()
	o := vhosttest.Options{Path: path, QueueSize: 64}
	return &echoes{t: t, g: vhosttest.Start(t, nil, o), stop: make(chan struct{}), done: make(chan struct{})}
}

// round sends some frames, and takes them back in their order.
func (e *echoes) round(n int) error {
	for i := range n {
		if err := e.g.Send(0, virtio.NetHdr{}, vhosttest.Frame(e.seq+uint64(i), 60+i), nil); err != nil {
			return fmt.Errorf("frame %d: %w", e.seq+uint64(i), err)
		}
	}
	for range n {
		_, f, err := e.g.Recv(0, patience)
		if err != nil {
			return fmt.Errorf("frame %d is lost: %w", e.seq, err)
		}
		got, err := vhosttest.CheckFrame(f)
		if err != nil || got != e.seq {
			return fmt.Errorf("frame %d came back for %d: %w", got, e.seq, err)
		}
		e.seq++
	}
	return nil
}

// run does that until end, or until a frame is lost.
func (e *echoes) run() {
	defer close(e.done)
	for {
		select {
		case <-e.stop:
			return
		default:
		}
		if err := e.round(16); err != nil {
			e.t.Error(err)
			return
		}
	}
}

// end returns how many frames have come back.
func (e *echoes) end() uint64 {
	close(e.stop)
	<-e.done
	return e.seq
}

// ports lists n ports without keys of their own.
func ports(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "[port.vm%d]\n", i)
	}
	return b.String()
}

// TestServe: several guests, each at its own port, and what is told of them.
func TestServe(t *testing.T) {
	m := startMany(t, ports(2)+"[port.dark]\nnet = \"null\"\n[metrics]\nlisten = \"127.0.0.1:0\"\n")
	for i := range 2 {
		if err := newEchoes(t, m.socket(fmt.Sprintf("vm%d", i))).round(10 + i); err != nil {
			t.Fatal(err)
		}
	}
	st := m.stats(t)
	for port, want := range map[string]struct {
		state  string
		frames uint64
	}{"vm0": {serving, 10}, "vm1": {serving, 11}, "dark": {waiting, 0}} {
		p := st[port]
		if p.State != want.state || p.flow(fromGuest).frames != want.frames || p.flow(toGuest).frames != want.frames || p.Socket != m.socket(port) {
			t.Errorf("%s: %+v", port, p)
		}
	}
	table := command(t, "stats", "--config", m.file()).stdout
	for _, want := range []string{"3 ports: 2 serving, 1 waiting, 0 failed", "vm1  serving         1          11"} {
		if !strings.Contains(table, want) {
			t.Errorf("no %q in\n%s", want, table)
		}
	}
	if one := command(t, "stats", "--config", m.file(), "--port", "vm1").stdout; !strings.Contains(one, "FromGuest    64  running      11") {
		t.Errorf("of one port:\n%s", one)
	}
	if got := command(t, "stats", "--config", m.file(), "--port", "vm7"); got.code != exitFailure || !strings.Contains(got.stderr, `there is no port "vm7"`) {
		t.Errorf("of a port that is not there: %+v", got)
	}
	code, text := get(t, metricsURL(t, m.process)+"/metrics")
	for _, want := range []string{
		`vhostd_port_open{port="dark"} 1`, `vhostd_front_end_connected{port="vm0"} 1`, `vhostd_front_end_connected{port="dark"} 0`,
		`vhostd_queue_frames_total{direction="FromGuest",port="vm1",queue="1"} 11`,
	} {
		if code != http.StatusOK || !strings.Contains(text, "\n"+want) {
			t.Errorf("no %s in the metrics", want)
		}
	}
	if code := m.end(syscall.SIGTERM); code != exitOK || exists(m.socket("vm0")) || exists(filepath.Join(m.dir, "ctl")) {
		t.Errorf("exit code %d, or a socket is left behind", code)
	}
}

// TestServeWithAFailedPort: the others are served, from the start.
func TestServeWithAFailedPort(t *testing.T) {
	dir := vhosttest.ShortDir(t)
	listenOn(t, filepath.Join(dir, "vm0.sock"))
	m := &many{dir: dir}
	m.write(t, ports(2))
	m.process = launch(t, exec.Command(binary, "serve", "--config", m.file()))
	if err := newEchoes(t, m.socket("vm1")).round(5); err != nil {
		t.Error(err)
	}
	if st := m.stats(t); st["vm0"].State != failed || st["vm1"].State != serving {
		t.Errorf("%+v", st)
	}
	m.change(t, "[port.vm1]\n") // a failed port can go
	if st := m.stats(t); len(st) != 1 {
		t.Errorf("%+v", st)
	}
}

// TestServeBesideHostile: of twenty ports, one has a guest that breaks its ring and one a front-end that talks nonsense, again and again. The others lose nothing.
func TestServeBesideHostile(t *testing.T) {
	const n = 20
	m := startMany(t, ports(n))
	var good []*echoes
	for i := range n - 2 {
		e := newEchoes(t, m.socket(fmt.Sprintf("vm%d", i)))
		good = append(good, e)
		go e.run()
	}
	for i := range 20 {
		g := vhosttest.Start(t, nil, vhosttest.Options{Path: m.socket("vm18")})
		q := g.Transmitq(0)
		q.Driver.RawSetAvailIndex(q.Driver.RawUsedIndex() + 0x4000)
		q.Kick.Signal()
		if i == 0 {
			eventually(t, "the ring is broken", func() bool { return m.stats(t)["vm18"].GuestErrors > 0 })
		}
		g.Close()
		c, err := net.Dial("unix", m.socket("vm19"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte(strings.Repeat("\xff", 200))); err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	eventually(t, "all sessions of the nonsense have ended", func() bool { return m.stats(t)["vm19"].FrontEndErrors > 0 })
	for i, e := range good {
		if n, st := e.end(), m.stats(t)[fmt.Sprintf("vm%d", i)]; n == 0 || st.Sessions != 1 || st.GuestErrors+st.FrontEndErrors != 0 {
			t.Errorf("port %d: %d frames, %+v", i, n, st)
		}
	}
}

// TestServeTellsServiceManager: READY=1 at the start and after each reload, RELOADING=1 with the time before, as systemd's Type=notify-reload has it.
func TestServeTellsServiceManager(t *testing.T) {
	m := &many{dir: vhosttest.ShortDir(t)}
	m.write(t, ports(1))
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(m.dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	hears := func(wants ...string) {
		t.Helper()
		b := make([]byte, 4096)
		for _, want := range wants {
			if err := manager.SetReadDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			if n, err := manager.Read(b); err != nil || !strings.HasPrefix(string(b[:n]), want) {
				t.Fatalf("%q, %v, want %s", b[:n], err, want)
			}
		}
	}
	cmd := exec.Command(binary, "serve", "--config", m.file())
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(m.dir, "notify"))
	m.process = launch(t, cmd)
	hears("STATUS=1 of 1 port", "READY=1")
	m.write(t, ports(3))
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	hears("RELOADING=1\nMONOTONIC_USEC=", "STATUS=3 of 3 ports", "READY=1")
	if m.end(syscall.SIGTERM) != exitOK {
		t.Error("it did not end cleanly")
	}
	hears("STOPPING=1")
}

// TestTooManyThreads: a port for whose queues there may be no threads is not opened, and says why.
func TestTooManyThreads(t *testing.T) {
	f := newFleet(t.Context(), "f", slog.New(slog.DiscardHandler), new(slog.LevelVar))
	if f.threads < otherThreads || f.threadsBy == "" {
		t.Fatalf("%d threads, says %s", f.threads, f.threadsBy)
	}
	f.threads, f.threadsBy = otherThreads+8, "this test"
	dir := vhosttest.ShortDir(t)
	file := config.Parse("f", []byte("[defaults]\nnet = \"null\"\nsocket-path = \""+dir+"/{port}\"\n[port.a]\nqueues = 3\n[port.b]\nqueues = 2\n[port.c]\n"))
	u := &understood{Config: file.Config}
	for _, name := range []string{"a", "b", "c"} {
		p := f.openPort(u.Ports[name], u.settle(file, name, portSettings(u.Ports[name])))
		f.put(id{config.KindPort, name}, p)
		defer p.stop() //nolint:errcheck // told by others
		switch err := p.err(); {
		case name != "b" && err != nil:
			t.Errorf("%s: %v", name, err)
		case name == "b" && (err == nil || err.Error() != "the port can take 4 threads, one for each queue, and 2 are left of the 264 that this test allows" || exists(dir+"/b")):
			t.Errorf("%s: %v", name, err)
		}
	}
}
