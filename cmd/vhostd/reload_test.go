package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/internal/config"
	"github.com/vhostd/vhostd/internal/require"
)

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

// TestReloadOwner: a daemon of root's that is confined gives its sockets to others when it reads its file again, and takes them back. What it cannot do leaves all as it was.
func TestReloadOwner(t *testing.T) {
	require.Root(t, "root")
	needConfinement(t)
	const owned, grouped = "socket-owner = \"65534\"\n", "socket-group = \"12345\"\n"
	m := startMany(t, "[port.a]\n"+owned+grouped+"[port.b]\n")
	is := func(port string, uid, gid uint32, mode os.FileMode) {
		t.Helper()
		info, err := os.Stat(m.socket(port))
		if err != nil {
			t.Fatal(err)
		}
		if st := info.Sys().(*syscall.Stat_t); st.Uid != uid || st.Gid != gid || info.Mode().Perm() != mode {
			t.Errorf("the socket of port %s has owner %d, group %d, mode %v, want %d, %d, %v", port, st.Uid, st.Gid, info.Mode().Perm(), uid, gid, mode)
		}
	}
	is("a", 65534, 12345, 0o660)
	m.change(t, "[port.a]\n[port.b]\n"+owned+grouped+"[port.c]\n"+owned+grouped)
	is("a", 0, uint32(os.Getegid()), 0o600)
	is("b", 65534, 12345, 0o660)
	is("c", 65534, 12345, 0o660)
	m.change(t, "[port.a]\n[port.b]\n"+owned+grouped+"socket-mode = \"0666\"\n[port.c]\n"+owned+grouped)
	is("b", 65534, 12345, 0o666)
	m.end(syscall.SIGTERM)

	const lan = "[switch.lan]\n[port.b]\nisolated = true\n[port.a]\n"
	m = startSwitch(t, lan)
	m.writeSwitch(t, lan+"isolated = true\nsocket-mode = \"0666\"\n"+owned)
	r, got := m.reload(t)
	if got.code != exitFailure || len(r.Steps) != 1 || !strings.HasPrefix(r.Steps[0].Error, "needs a restart: ") || r.Steps[0].Stands != "it goes on as before" {
		t.Errorf("%+v", got)
	}
	is("a", 0, uint32(os.Getegid()), 0o600)
	a, b := m.guest(t, "a"), m.guest(t, "b")
	send(t, a, ethernet(0xa, 0xff, 1))
	gets(t, b, ethernet(0xa, 0xff, 1))
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
