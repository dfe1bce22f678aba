//go:build linux

// The agent runs inside the guest, started by u-root's init, and does what the test on the host asks for.
//
// It is one static program that needs nothing from the guest but a kernel: the tests' traffic, checks and settings are
// Go, shared with the host side (test/vm/stream, test/vm/rpc). A request that fails is answered with its error; the
// agent itself only ends with the guest.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/hugelgupf/vmtest/guest"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/test/vm/rpc"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("agent: ")
	port, err := openPort(30 * time.Second)
	if err != nil {
		log.Fatal(err)
	}
	if _, err := configureLink(rpc.LinkArgs{Name: "lo", Up: true}); err != nil {
		log.Print(err)
	}
	a := &agent{port: port}
	// A line of our own end: what an earlier boot left unfinished on the channel ends here.
	a.write([]byte("\n"))
	a.respond(rpc.Response{Hello: hello()})
	log.Fatal(a.serve())
}

// openPort waits for the virtio-serial port: its driver may still be probing.
func openPort(wait time.Duration) (*os.File, error) {
	for end := time.Now().Add(wait); ; time.Sleep(50 * time.Millisecond) {
		path, err := guest.VirtioSerialDevice(rpc.Port)
		if err == nil {
			var f *os.File
			if f, err = os.OpenFile(path, os.O_RDWR, 0); err == nil {
				return f, nil
			}
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("no port %s after %v: %w", rpc.Port, wait, err)
		}
	}
}

func hello() *rpc.Hello {
	h := &rpc.Hello{}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var s unix.Sysinfo_t
	if unix.Sysinfo(&s) == nil {
		h.Uptime = time.Duration(s.Uptime) * time.Second
	}
	return h
}

type agent struct {
	port    *os.File
	mu      sync.Mutex // one line at a time
	traffic traffic
	hold    [][]byte
	frames  frames
}

// serve answers requests until the port fails. While the host has not connected, reads give end-of-file.
func (a *agent) serve() error {
	for {
		r := bufio.NewReaderSize(a.port, 1<<20)
		for {
			line, err := r.ReadBytes('\n')
			if err != nil {
				break
			}
			var q rpc.Request
			if err := json.Unmarshal(line, &q); err != nil {
				log.Printf("request %q: %v", strings.TrimSpace(string(line)), err)
				continue
			}
			go a.answer(q)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (a *agent) answer(q rpc.Request) {
	result, err := a.do(q)
	resp := rpc.Response{ID: q.ID}
	if err == nil {
		resp.Result, err = json.Marshal(result)
	}
	if err != nil {
		resp = rpc.Response{ID: q.ID, Error: fmt.Sprintf("%s: %v", q.Op, err)}
	}
	a.respond(resp)
}

func (a *agent) respond(r rpc.Response) {
	b, err := json.Marshal(r)
	if err != nil {
		panic(fmt.Sprintf("bug: %v", err))
	}
	a.write(append(b, '\n'))
}

func (a *agent) write(b []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, err := a.port.Write(b); err != nil {
		log.Printf("write to the host: %v", err)
	}
}

// do decodes the arguments of an operation and runs it.
func (a *agent) do(q rpc.Request) (any, error) {
	switch q.Op {
	case rpc.OpExec:
		return with(q.Args, execute)
	case rpc.OpRead:
		return with(q.Args, readFile)
	case rpc.OpWrite:
		return with(q.Args, writeFile)
	case rpc.OpGlob:
		return with(q.Args, glob)
	case rpc.OpLink:
		return with(q.Args, configureLink)
	case rpc.OpPing:
		return with(q.Args, ping)
	case rpc.OpTCP:
		return with(q.Args, transfer)
	case rpc.OpUDP:
		return with(q.Args, echo)
	case rpc.OpHTTP:
		return with(q.Args, fetch)
	case rpc.OpLookup:
		return with(q.Args, lookup)
	case rpc.OpServe:
		return with(q.Args, serve)
	case rpc.OpTraffic:
		return with(q.Args, a.traffic.do)
	case rpc.OpHold:
		return with(q.Args, a.holdMemory)
	case rpc.OpWatch:
		return with(q.Args, a.frames.watch)
	case rpc.OpFrames:
		return with(q.Args, a.frames.do)
	}
	return nil, fmt.Errorf("unknown operation")
}

func with[A, R any](raw json.RawMessage, f func(A) (R, error)) (any, error) {
	var args A
	if err := json.Unmarshal(raw, &args); err != nil {
		return nil, fmt.Errorf("arguments: %w", err)
	}
	return f(args)
}
