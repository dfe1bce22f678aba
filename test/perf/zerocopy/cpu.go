//go:build linux

package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/placement"
)

// tick is the kernel's unit of /proc/stat.
const tick = 10 * time.Millisecond

// reading is the machine's clocks at one moment.
type reading struct {
	at       time.Time
	back     time.Duration // vhostd
	guest    time.Duration
	softirqd time.Duration   // of vhostd's processor
	kthreads []time.Duration // all other kernel threads of the machine, as in meter
	busy     time.Duration   // vhostd's processor, by ticks
	irq      time.Duration   // interrupts and softirqs on vhostd's processor, by ticks
	stolen   time.Duration   // from both processors, by ticks
}

// meter reads the clocks.
type meter struct {
	back, guest   int // process ids
	cpu, guestCPU int
	softirqd      int
	kthreads      []int
}

func newMeter(back, guest, cpu, guestCPU int) (*meter, error) {
	m := &meter{back: back, guest: guest, cpu: cpu, guestCPU: guestCPU}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil {
			continue // it has ended
		}
		name, rest, _ := bytes.Cut(stat, []byte(") "))
		fields := strings.Fields(string(rest))
		if len(fields) < 2 || fields[1] != "2" {
			continue // no child of kthreadd
		}
		if bytes.HasSuffix(name, fmt.Appendf(nil, "(ksoftirqd/%d", cpu)) {
			m.softirqd = pid
		} else {
			m.kthreads = append(m.kthreads, pid)
		}
	}
	if m.softirqd == 0 {
		return nil, fmt.Errorf("there is no ksoftirqd/%d: this needs a view of the host's processes", cpu)
	}
	return m, nil
}

func (m *meter) read() (r reading, err error) {
	r.at = time.Now()
	if r.back, err = placement.Clock(m.back); err != nil {
		return r, err
	}
	if r.guest, err = placement.Clock(m.guest); err != nil {
		return r, err
	}
	if r.softirqd, err = placement.Clock(m.softirqd); err != nil {
		return r, err
	}
	for _, pid := range m.kthreads {
		t, _ := placement.Clock(pid) // 0 for one that has ended
		r.kthreads = append(r.kthreads, t)
	}
	return r, r.readStat(m.cpu, m.guestCPU)
}

// readStat reads /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal.
func (r *reading) readStat(cpu, guestCPU int) error {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 9 || f[0] != fmt.Sprintf("cpu%d", cpu) && f[0] != fmt.Sprintf("cpu%d", guestCPU) {
			continue
		}
		var v [8]time.Duration
		for i := range v {
			n, err := strconv.ParseInt(f[i+1], 10, 64)
			if err != nil {
				return fmt.Errorf("/proc/stat: %w", err)
			}
			v[i] = time.Duration(n) * tick
		}
		r.stolen += v[7]
		if f[0] == fmt.Sprintf("cpu%d", cpu) {
			r.irq = v[5] + v[6]
			r.busy = v[0] + v[1] + v[2] + r.irq
		}
	}
	return nil
}

// irqTimeApart tells whether this kernel charges interrupts, and the network's softirqs with them, to no process (IRQ_TIME_ACCOUNTING). Then they
// are counted from /proc/stat.
func irqTimeApart() bool {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return false
	}
	text, err := os.ReadFile("/boot/config-" + unix.ByteSliceToString(u.Release[:]))
	if f, err2 := os.Open("/proc/config.gz"); err2 == nil {
		defer f.Close()
		var z *gzip.Reader
		if z, err = gzip.NewReader(f); err == nil {
			text, err = io.ReadAll(z)
		}
	}
	return err == nil && bytes.Contains(text, []byte("\nCONFIG_IRQ_TIME_ACCOUNTING=y"))
}
