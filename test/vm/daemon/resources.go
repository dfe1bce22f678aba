//go:build linux

package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"
)

// Resources are what a process holds, seen from outside.
type Resources struct {
	FDs     map[string]int // how many open files of each kind
	Memory  int            // mappings of guest memory (memfd)
	Threads int
	RSSKiB  int
	// Goroutines is set by those who can ask for it.
	Goroutines int
}

// ResourcesOf looks into /proc.
func ResourcesOf(pid int) (Resources, error) {
	dir := fmt.Sprintf("/proc/%d", pid)
	r := Resources{FDs: map[string]int{}}
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return r, err
	}
	for _, fd := range fds {
		if target, err := os.Readlink(filepath.Join(dir, "fd", fd.Name())); err == nil {
			r.FDs[kind(target)]++
		} // else closed meanwhile
	}
	maps, err := os.ReadFile(filepath.Join(dir, "maps"))
	r.Memory = strings.Count(string(maps), "/memfd:")
	status, err2 := os.ReadFile(filepath.Join(dir, "status"))
	for line := range strings.Lines(string(status)) {
		_, _ = fmt.Sscanf(line, "Threads: %d", &r.Threads)
		_, _ = fmt.Sscanf(line, "VmRSS: %d", &r.RSSKiB)
	}
	return r, errors.Join(err, err2)
}

// kind drops what differs between two files of one sort: "socket:[123]" is a "socket", "anon_inode:[eventfd]" an
// "eventfd".
func kind(target string) string {
	if name, ok := strings.CutPrefix(target, "anon_inode:"); ok {
		return strings.Trim(name, "[]")
	}
	before, _, _ := strings.Cut(target, ":[")
	return before
}

// looks is how often Goroutines asks.
const looks = 15

// Goroutines asks vhostd's metrics how many goroutines there are. Of a process in which nothing happens that is told as one to three more or less, as those are counted that
// gather the metrics: it is the middle one of several answers.
func (d *Daemon) Goroutines(ctx context.Context) (int, error) {
	var all []int
	for range looks {
		n, err := d.goroutines(ctx)
		if err != nil {
			return 0, err
		}
		all = append(all, n)
	}
	slices.Sort(all)
	return all[looks/2], nil
}

func (d *Daemon) goroutines(ctx context.Context) (int, error) {
	dial := func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
		err = d.opts.Namespace.Do(func() error {
			conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
			return err
		})
		return conn, err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+d.opts.Metrics+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := (&http.Transport{DialContext: dial, DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return 0, fmt.Errorf("vhostd --metrics: %w", err)
	}
	defer resp.Body.Close()
	for s := bufio.NewScanner(resp.Body); s.Scan(); {
		var n int
		if _, err := fmt.Sscanf(s.Text(), "go_goroutines %d", &n); err == nil {
			return n, nil
		}
	}
	return 0, errors.New("vhostd --metrics: no go_goroutines")
}

// Total is the number of open files.
func (r Resources) Total() int {
	n := 0
	for _, c := range r.FDs {
		n += c
	}
	return n
}

// String lists everything in a fixed order.
func (r Resources) String() string {
	var kinds []string
	for k, n := range r.FDs {
		kinds = append(kinds, fmt.Sprintf("%s %d", k, n))
	}
	sort.Strings(kinds)
	return fmt.Sprintf("%d fds (%s), %d guest memory mappings, %d threads, %d goroutines, %d KiB resident",
		r.Total(), strings.Join(kinds, ", "), r.Memory, r.Threads, r.Goroutines, r.RSSKiB)
}

// Leak compares with an earlier look at the same process in the same state, and describes what is more. Threads are
// kept by the Go runtime after their use, so a few more are none; what grows with each round is told by the caller
// from several rounds.
func (r Resources) Leak(before Resources) string {
	var more []string
	for k, n := range r.FDs {
		if n > before.FDs[k] {
			more = append(more, fmt.Sprintf("%s: %d, was %d", k, n, before.FDs[k]))
		}
	}
	if r.Memory > before.Memory {
		more = append(more, fmt.Sprintf("guest memory mappings: %d, was %d", r.Memory, before.Memory))
	}
	if r.Goroutines > before.Goroutines {
		more = append(more, fmt.Sprintf("goroutines: %d, were %d", r.Goroutines, before.Goroutines))
	}
	sort.Strings(more)
	return strings.Join(more, "; ")
}
