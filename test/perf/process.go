package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The processors that the two ends run on.
const (
	backCPU  = 0
	guestCPU = 1
)

// process is a back-end or a guest, with what it has printed.
type process struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	done  chan struct{}

	mu  sync.Mutex
	out bytes.Buffer
}

// Write collects output.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

func (p *process) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

func (p *process) tail() string {
	lines := strings.Split(p.output(), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

func start(cpu int, name string, args ...string) (*process, error) {
	p := &process{done: make(chan struct{})}
	p.cmd = exec.Command("taskset", append([]string{"-c", strconv.Itoa(cpu), "stdbuf", "-oL", name}, args...)...)
	p.cmd.Stdout, p.cmd.Stderr = p, p
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) say(line string) { fmt.Fprintln(p.stdin, line) }

// stop ends the process, gently at first.
func (p *process) stop() {
	p.say("quit")
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(5 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// expect waits for a line of output.
func (p *process) expect(what string, limit time.Duration) error {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if strings.Contains(p.output(), what) {
			return nil
		}
		if p.ended() {
			break
		}
	}
	return fmt.Errorf("no %q in:\n%s", what, p.tail())
}

func startVhostd(binary string, w work, socket string, cpu int) (*process, error) {
	net := "null"
	if w.rx {
		net = fmt.Sprintf("null,generate=on,size=%d", w.size)
	}
	return start(cpu, binary, "run", "--socket-path", socket, "--net", net)
}

// mbuf is the size of the guest's and of DPDK's buffers in bytes, 128 of which are headroom.
const (
	mbuf     = 2176
	mbufRoom = mbuf - 128
)

// testpmd starts dpdk-testpmd with one virtual device, on one processor.
func testpmd(cpu int, role, vdev, mode string, w work) (*process, error) {
	lcores := fmt.Sprintf("0@%d,1@%d", cpu, cpu)
	prefix := fmt.Sprintf("perf%d%s", os.Getpid(), role)
	args := []string{"--lcores", lcores, "--no-pci", "--no-telemetry", "--iova-mode=va", "--file-prefix=" + prefix,
		"--in-memory", "--single-file-segments", "-m", "256", "--vdev", vdev, "--",
		"-i", "--nb-cores=1", "--portmask=0x1", "--no-lsc-interrupt", "--burst=32", "--total-num-mbufs=16384",
		fmt.Sprintf("--mbuf-size=%d", mbuf), "--txpkts=" + segments(w.size), "--forward-mode=" + mode}
	if w.size > 1518 {
		args = append(args, fmt.Sprintf("--max-pkt-len=%d", w.size+18), "--tx-offloads=0x8000")
		if role == "guest" {
			args = append(args, "--enable-scatter")
		}
	}
	p, err := start(cpu, "dpdk-testpmd", args...)
	if err != nil {
		return nil, fmt.Errorf("%w (apt-get install dpdk)", err)
	}
	return p, nil
}

// segments is a frame's length as testpmd wants it, cut into its buffers.
func segments(size int) string {
	var s []string
	for ; size > mbufRoom; size -= mbufRoom {
		s = append(s, strconv.Itoa(mbufRoom))
	}
	return strings.Join(append(s, strconv.Itoa(size)), ",")
}

func startDPDK(w work, socket string, cpu int) (*process, error) {
	mode := "rxonly"
	if w.rx {
		mode = "txonly"
	}
	return testpmd(cpu, "back", "net_vhost0,iface="+socket+",queues=1,client=0", mode, w)
}

func startGuest(w work, socket string, cpu int) (*process, error) {
	mode := "txonly"
	if w.rx {
		mode = "rxonly"
	}
	vdev := "net_virtio_user0,path=" + socket + ",queues=1,queue_size=256,mrg_rxbuf=1,in_order=1"
	p, err := testpmd(cpu, "guest", vdev, mode, w)
	if err != nil {
		return nil, err
	}
	if err := p.expect("testpmd>", 30*time.Second); err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

var packets = map[bool]*regexp.Regexp{
	true:  regexp.MustCompile(`RX-packets: (\d+)`),
	false: regexp.MustCompile(`TX-packets: (\d+)`),
}

// maxWaited is the most that the threads of the two ends may have waited for their processors in a second that counts.
const maxWaited = 40 * time.Millisecond

// sample asks the guest once a second how many frames it has moved, until enough seconds were good: one placement class before and after,
// and nothing else on the processors. It gives up after a few times as many.
func (p *process) sample(w work, back *process, seconds int) ([]sample, error) {
	var all []sample
	for tries := 0; tries < 4*seconds && len(all) < seconds; tries++ {
		class, waited := placement(), p.waited()+back.waited()
		from, at, err := p.count(w)
		if err != nil {
			return nil, err
		}
		time.Sleep(time.Second)
		to, now, err := p.count(w)
		if err != nil {
			return nil, err
		}
		quiet := p.waited()+back.waited()-waited < maxWaited
		if quiet && class == placement() {
			all = append(all, sample{float64(to-from) / now.Sub(at).Seconds() / 1e6, class})
		}
	}
	return all, nil
}

// waited is how long the threads of p have waited for a processor although they could have run.
func (p *process) waited() time.Duration {
	var sum time.Duration
	stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.cmd.Process.Pid))
	for _, path := range stats {
		text, _ := os.ReadFile(path)
		var run, wait time.Duration
		if _, err := fmt.Sscan(string(text), &run, &wait); err == nil {
			sum += wait
		}
	}
	return sum
}

// count reads the guest's packet counter, and when it was read. The guest's console shares a processor with its polling and may take long.
func (p *process) count(w work) (uint64, time.Time, error) {
	re := packets[w.rx]
	seen := len(re.FindAllString(p.output(), -1))
	p.say("show port stats all")
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end) && !p.ended(); time.Sleep(2 * time.Millisecond) {
		if m := re.FindAllStringSubmatch(p.output(), -1); len(m) > seen {
			n, err := strconv.ParseUint(m[len(m)-1][1], 10, 64)
			return n, time.Now(), err
		}
	}
	return 0, time.Time{}, fmt.Errorf("the guest does not answer:\n%s", p.tail())
}
