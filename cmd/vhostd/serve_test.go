package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

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

// TestReloadFollowsNoLink: who may write to the directory of a socket, such as its VMM, cannot have another file's mode changed.
func TestReloadFollowsNoLink(t *testing.T) {
	m := startMany(t, "[port.a]\n")
	file := filepath.Join(m.dir, "precious")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Remove(m.socket("a")), os.Symlink(file, m.socket("a"))); err != nil {
		t.Fatal(err)
	}
	m.write(t, "[port.a]\nsocket-mode = \"0666\"\n")
	if r, got := m.reload(t); got.code != exitFailure || len(r.Steps) != 1 || !strings.HasPrefix(r.Steps[0].Error, "socket-mode: ") || !strings.Contains(r.Steps[0].Error, "no socket any more") {
		t.Errorf("%+v", got)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file behind the link has mode %v (%v), want 0600", info.Mode(), err)
	}
}

// TestReload goes through what can happen to a port, beside one to which nothing does.
func TestReload(t *testing.T) {
	const same = "[port.same]\n"
	m := startMany(t, same+"[port.gone]\n[port.mtu]\n[port.mode]\n")
	e, mtu, mode := newEchoes(t, m.socket("same")), newEchoes(t, m.socket("mtu")), newEchoes(t, m.socket("mode"))
	go e.run()
	m.write(t, same+"[port.mtu]\nmtu = 9000\n[port.mode]\nsocket-mode = \"0640\"\n[port.comes]\n[log]\nlevel = \"debug\"")
	want := reloadReport{
		Config: m.file(), Unchanged: 1, Changed: []string{"log.level"},
		Steps: []stepReport{
			{Step: config.Step{Action: config.Remove, Kind: config.KindPort, Name: "gone"}},
			{Step: config.Step{Action: config.Reopen, Kind: config.KindPort, Name: "mtu", Keys: []string{"mtu"}}},
			{Step: config.Step{Action: config.Change, Kind: config.KindPort, Name: "mode", Keys: []string{"socket-mode"}}},
			{Step: config.Step{Action: config.Add, Kind: config.KindPort, Name: "comes"}},
		},
	}
	plan, got := m.reload(t, "--dry-run")
	if !plan.DryRun || exists(m.socket("comes")) || !exists(m.socket("gone")) {
		t.Errorf("a dry run has done something: %+v", got)
	}
	plan.DryRun = false
	r, got := m.reload(t)
	if diff := cmp.Diff(want, r) + cmp.Diff(want, plan); diff != "" || got.code != exitOK {
		t.Errorf("code %d, -want +got\n%s", got.code, diff)
	}
	if !exists(m.socket("comes")) || exists(m.socket("gone")) {
		t.Error("the sockets are not what the configuration says")
	}
	if info, err := os.Stat(m.socket("mode")); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if err := mode.round(5); err != nil {
		t.Errorf("a port that was changed in place: %v", err)
	}
	if _, err := mtu.g.FE.GetFeatures(); err == nil {
		t.Error("a port was opened anew, and its front-end not disconnected")
	}
	mtu.g.Reconnect()
	if err := mtu.round(5); err != nil {
		t.Errorf("a port that was opened anew: %v", err)
	}
	if err := newEchoes(t, m.socket("comes")).round(5); err != nil {
		t.Errorf("a port that was added: %v", err)
	}
	if n := e.end(); n == 0 || m.stats(t)["same"].Sessions != 1 {
		t.Errorf("the port that did not change: %d frames, %+v", n, m.stats(t)["same"])
	}
	m.waitLog("level=DEBUG")
}

// TestReloadRefused: a file with an error in it changes nothing, and whoever asked hears all of them.
func TestReloadRefused(t *testing.T) {
	m := startMany(t, ports(2))
	e := newEchoes(t, m.socket("vm0"))
	m.write(t, "[port.vm0]\nmtuu = 1\n[port.vm7]\nnet = \"sing\"\nmac = \"x\"\n")
	for _, args := range [][]string{{"reload", "--control", filepath.Join(m.dir, "ctl")}, {"reload", "--config", m.file()}, {"check", "--config", m.file()}} {
		got := command(t, args...)
		if got.code != exitFailure || !strings.Contains(got.stderr, "the configuration is refused:\n"+m.file()+":7: port.vm0.mtuu: unknown key: did you mean mtu?\n") {
			t.Errorf("%v: %+v", args, got)
		}
		if len(args) > 1 && args[1] == "--config" && args[0] == "reload" {
			continue // the file has to be read to find the daemon, and what it says of networks is the daemon's to understand
		}
		for _, want := range []string{`:9: port.vm7.net: "sing": unknown kind "sing"`, `:10: port.vm7.mac: "x": want an address`} {
			if !strings.Contains(got.stderr, want) {
				t.Errorf("%v: no %s in %s", args, want, got.stderr)
			}
		}
	}
	if err := m.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	m.waitLog("nothing is changed")
	if err := e.round(5); err != nil || len(m.stats(t)) != 2 || exists(m.socket("vm7")) {
		t.Errorf("%v, %+v", err, m.stats(t))
	}
	m.write(t, ports(3))
	if err := m.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	m.waitLog("configuration applied")
	if err := newEchoes(t, m.socket("vm2")).round(5); err != nil {
		t.Errorf("after SIGHUP: %v", err)
	}
	if got := command(t, "serve", "--config", filepath.Join(m.dir, "none")); got.code != exitFailure || !strings.Contains(got.stderr, "no such file") {
		t.Errorf("without a file: %+v", got)
	}
}

// TestReloadHalfFailed: what can be done is done, what stands is told, and the next reload tries again.
func TestReloadHalfFailed(t *testing.T) {
	m := startMany(t, "[port.a]\n")
	taken := listenOn(t, m.socket("b"))
	m.write(t, "[port.a]\n[port.b]\n[port.c]\n[log]\nformat = \"json\"\n")
	r, got := m.reload(t)
	if got.code != exitFailure || !strings.Contains(got.stderr, "1 step of 2 failed") || r.Failed != 1 || len(r.Steps) != 2 ||
		!strings.Contains(r.Steps[0].Error, "in use by another process") || r.Steps[0].Stands != "it is closed" || r.Steps[1].Error != "" {
		t.Fatalf("%+v", got)
	}
	if st := m.stats(t); st["b"].State != failed || !strings.Contains(st["b"].Error, "in use") || st["c"].State != waiting || st["b"].Stats != nil {
		t.Errorf("%+v", st)
	}
	if got := command(t, "stats", "--config", m.file(), "--port", "b"); !strings.Contains(got.stderr, "port b is closed: ") {
		t.Errorf("%+v", got)
	}
	if table := command(t, "stats", "--config", m.file()).stdout; !strings.Contains(table, "port b is closed: ") {
		t.Errorf("no reason in\n%s", table)
	}
	taken.Close()
	r, got = m.reload(t)
	if len(r.Steps) != 1 || r.Steps[0].Name != "b" || r.Failed != 0 || r.Unchanged != 2 {
		t.Errorf("the next time: %+v", got)
	}
	if got.code != exitFailure || !strings.Contains(got.stderr, "a restart is needed: log.format") {
		t.Errorf("the format of the log was changed in passing: %+v", got)
	}
	if err := newEchoes(t, m.socket("b")).round(5); err != nil {
		t.Error(err)
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

// TestReloadUnderTraffic: a hundred reloads, each of which does something, and no frame of the ports that stay as they are is lost.
func TestReloadUnderTraffic(t *testing.T) {
	m := startMany(t, ports(2))
	a, b := newEchoes(t, m.socket("vm0")), newEchoes(t, m.socket("vm1"))
	go a.run()
	go b.run()
	for i := range 100 {
		r := m.change(t, fmt.Sprintf("%s[port.other%d]\n[port.changes]\nmtu = %d\n", ports(2), i, 1000+i))
		if r.Unchanged != 2 {
			t.Fatalf("reload %d: %+v", i, r)
		}
	}
	t.Logf("%d and %d frames", a.end(), b.end())
	st := m.stats(t)
	if len(st) != 4 || st["vm0"].Sessions != 1 || st["vm1"].Sessions != 1 || a.seq == 0 || b.seq == 0 {
		t.Errorf("%+v", st)
	}
}

// TestReloadConcurrently: reloads of many who ask at the same time follow one another, while others ask for counters, and nothing is left over.
func TestReloadConcurrently(t *testing.T) {
	m := startMany(t, ports(2))
	e := newEchoes(t, m.socket("vm0"))
	go e.run()
	var all sync.WaitGroup
	for i := range 6 {
		all.Go(func() {
			for j := range 5 {
				text := ports(2 + (i+j)%3)
				if err := os.WriteFile(m.file()+fmt.Sprint(i), []byte(strings.ReplaceAll(head+text, "DIR", m.dir)), 0o600); err != nil {
					t.Error(err)
				}
				if err := os.Rename(m.file()+fmt.Sprint(i), m.file()); err != nil {
					t.Error(err)
				}
				if got := command(t, "reload", "--config", m.file()); got.code != exitOK {
					t.Errorf("%+v", got)
				}
				if got := command(t, "stats", "--config", m.file()); got.code != exitOK {
					t.Errorf("%+v", got)
				}
			}
		})
	}
	all.Wait()
	m.change(t, ports(2))
	sockets, err := filepath.Glob(m.dir + "/*.sock")
	if err != nil || len(sockets) != 2 || len(m.stats(t)) != 2 {
		t.Errorf("left are %v, %v", sockets, err)
	}
	if e.end() == 0 {
		t.Error("no frames")
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
