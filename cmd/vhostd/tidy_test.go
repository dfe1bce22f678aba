package main

import (
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vhostd/vhostd/internal/vhosttest"
)

// Memory is given back once nobody has left for a while, and not before; and again after the next guest.
func TestTidier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // whose clock goes on when all sleep
		var (
			guests tidier
			now    runtime.MemStats
		)
		after := func(d time.Duration, want uint32, when string) {
			t.Helper()
			before := now.NumForcedGC
			time.Sleep(d)
			synctest.Wait()
			runtime.ReadMemStats(&now)
			if n := now.NumForcedGC - before; n != want {
				t.Fatalf("%s: memory was collected %d times, want %d", when, n, want)
			}
		}
		runtime.ReadMemStats(&now)
		for range 2 {
			for range 3 {
				guests.left()
				after(tidyAfter-1, 0, "guests leave one after the other")
			}
			ballast = make([]byte, 64<<20)
			for i := range ballast {
				ballast[i] = 1
			}
			ballast = nil
			after(1, 1, "nobody has left for a while")
			if kept := now.HeapIdle - now.HeapReleased; kept > 16<<20 {
				t.Errorf("%d MiB that nobody uses are kept", kept>>20)
			}
			after(time.Hour, 0, "nobody leaves")
		}
	})
}

// ballast is in the heap, whatever the compiler thinks of it.
var ballast []byte

// A guest that leaves one of the ports of a daemon is told of.
func TestServeTidies(t *testing.T) {
	m := &many{dir: vhosttest.ShortDir(t)}
	m.write(t, "[port.a]\n")
	cmd := exec.Command(binary, "serve", "--config", m.file())
	cmd.Env = append(os.Environ(), "GODEBUG=gctrace=1")
	m.process = launch(t, cmd)
	const collected = "(forced)" // as Go's runtime says when the program asked for it
	e := newEchoes(t, m.socket("a"))
	if err := e.round(10); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(m.stderr.String(), collected) {
		t.Error("memory is collected while nobody has left")
	}
	e.g.Hangup()
	m.waitLog(collected)
}
