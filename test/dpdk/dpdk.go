// Package dpdk runs DPDK's dpdk-testpmd: its virtio-user driver is a guest that nobody here wrote, its vhost library a back-end to be
// compared with.
//
// A testpmd is driven over its console. It polls all the time, on the processor that it is given.
package dpdk

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vhostd/vhostd/test/vm/netlab"
)

// Process is a program that runs, with what it has printed.
type Process struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	done  chan struct{}

	mu  sync.Mutex
	out bytes.Buffer
}

// Write collects output.
func (p *Process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

// Output is all that it has printed.
func (p *Process) Output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// Tail is the last lines of that.
func (p *Process) Tail() string {
	lines := strings.Split(p.Output(), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Start runs a program on one processor, or on any for -1. It is killed when this process ends.
func Start(cpu int, name string, args ...string) (*Process, error) {
	args = append([]string{"-oL", name}, args...)
	program := "stdbuf"
	if cpu >= 0 {
		args = append([]string{"-c", strconv.Itoa(cpu), program}, args...)
		program = "taskset"
	}
	p := &Process{cmd: exec.Command(program, args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := netlab.Host.Start(p.cmd); err != nil { // which has it killed when this process ends
		return nil, err
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Ended reports whether the process has ended.
func (p *Process) Ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Say writes a line to its console.
func (p *Process) Say(line string) { fmt.Fprintln(p.stdin, line) }

// Stop ends the process, gently at first.
func (p *Process) Stop() {
	p.Say("quit")
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	p.wait(5 * time.Second)
}

// Quit has a testpmd close its ports and end, which writes out what they have.
func (p *Process) Quit() {
	p.Say("quit")
	p.wait(20 * time.Second)
}

func (p *Process) wait(limit time.Duration) {
	select {
	case <-p.done:
	case <-time.After(limit):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// Expect waits for a text in its output.
func (p *Process) Expect(what string, limit time.Duration) error {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if strings.Contains(p.Output(), what) {
			return nil
		}
		if p.Ended() {
			break
		}
	}
	return fmt.Errorf("no %q in:\n%s", what, p.Tail())
}

// WaitSocket waits until p has made a socket.
func (p *Process) WaitSocket(path string) error {
	for range 400 {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		if p.Ended() {
			return fmt.Errorf("ended early:\n%s", p.Tail())
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("no socket after 20 s:\n%s", p.Tail())
}

// Mbuf is the size of testpmd's buffers in bytes, and MbufRoom what a frame has of it.
const (
	Mbuf     = 2176
	MbufRoom = Mbuf - 128
)

// Options say what a testpmd is made of.
type Options struct {
	CPU     int      // processor; -1: any
	Vdevs   []string // its ports
	Mode    string   // of forwarding: io, txonly, rxonly, ...
	Frame   int      // bytes of the frames that txonly makes, and the longest that come
	Scatter bool     // frames over several buffers come
	NoHuge  bool     // 4 KiB pages
	SIMD    bool     // all vector instructions that there are
	Extra   []string // further arguments of testpmd's own
}

// started makes the file prefix of each unique.
var started atomic.Int32

// Testpmd starts a dpdk-testpmd and waits for its console. Forwarding begins with Say("start").
func Testpmd(o Options) (*Process, error) {
	cpu := max(o.CPU, 0)
	args := []string{"--lcores", fmt.Sprintf("0@%d,1@%d", cpu, cpu), "--no-pci", "--no-telemetry", "--iova-mode=va", "-m", "256",
		fmt.Sprintf("--file-prefix=vhostd%d.%d", os.Getpid(), started.Add(1))}
	if o.NoHuge {
		args = append(args, "--no-huge", "--no-shconf")
	} else {
		args = append(args, "--in-memory", "--single-file-segments")
	}
	if o.SIMD {
		args = append(args, "--force-max-simd-bitwidth=512")
	}
	for _, v := range o.Vdevs {
		args = append(args, "--vdev", v)
	}
	args = append(args, "--", "-i", "--nb-cores=1", fmt.Sprintf("--portmask=%#x", 1<<len(o.Vdevs)-1), "--no-lsc-interrupt", "--burst=32",
		"--total-num-mbufs=16384", fmt.Sprintf("--mbuf-size=%d", Mbuf), "--txpkts="+segments(o.Frame), "--forward-mode="+o.Mode)
	if o.Frame > 1518 {
		args = append(args, fmt.Sprintf("--max-pkt-len=%d", o.Frame+18), "--tx-offloads=0x8000") // MULTI_SEGS
	}
	if o.Scatter {
		args = append(args, "--enable-scatter")
	}
	p, err := Start(o.CPU, "dpdk-testpmd", append(args, o.Extra...)...)
	if err != nil {
		return nil, err
	}
	if err := p.Expect("testpmd>", 60*time.Second); err != nil {
		p.Stop()
		return nil, err
	}
	return p, nil
}

// segments is a frame's length as testpmd wants it, cut into its buffers.
func segments(size int) string {
	var s []string
	for ; size > MbufRoom; size -= MbufRoom {
		s = append(s, strconv.Itoa(MbufRoom))
	}
	return strings.Join(append(s, strconv.Itoa(size)), ",")
}

// Form is a way in which virtio-user drives a ring.
type Form struct {
	Packed, InOrder, Mergeable, Vectorized bool
	Size                                   int // of the ring; 0: 256
}

func (f Form) String() string {
	name := "split"
	if f.Packed {
		name = "packed"
	}
	for _, part := range []struct {
		on   bool
		name string
	}{{f.InOrder, "in_order"}, {f.Mergeable, "mergeable"}, {f.Vectorized, "vectorized"}} {
		if part.on {
			name += "," + part.name
		}
	}
	return name
}

// VirtioUser is the port that drives the back-end at a socket as a guest.
func (f Form) VirtioUser(socket string) string {
	bit := map[bool]int{true: 1}
	size := f.Size
	if size == 0 {
		size = 256
	}
	return fmt.Sprintf("net_virtio_user0,path=%s,queues=1,queue_size=%d,packed_vq=%d,in_order=%d,mrg_rxbuf=%d,vectorized=%d",
		socket, size, bit[f.Packed], bit[f.InOrder], bit[f.Mergeable], bit[f.Vectorized])
}

// Vhost is the port that is DPDK's back-end at a socket.
func Vhost(socket string) string { return "net_vhost0,iface=" + socket + ",queues=1,client=0" }

// Stats are a port's counters of frames.
type Stats struct {
	Received, Sent uint64
	At             time.Time
}

var statsRE = regexp.MustCompile(`(?s)RX-packets: (\d+).*?TX-packets: (\d+) `)

// Stats asks a port for its counters. A console that shares a processor with a flood may take long to answer.
func (p *Process) Stats(port int) (s Stats, err error) {
	seen := len(p.Output())
	p.Say(fmt.Sprintf("show port stats %d", port))
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end) && !p.Ended(); time.Sleep(2 * time.Millisecond) {
		m := statsRE.FindStringSubmatch(p.Output()[seen:])
		if m == nil {
			continue
		}
		s.At = time.Now()
		if s.Received, err = strconv.ParseUint(m[1], 10, 64); err != nil {
			return s, err
		}
		s.Sent, err = strconv.ParseUint(m[2], 10, 64)
		return s, err
	}
	return s, fmt.Errorf("testpmd does not answer:\n%s", p.Tail())
}
